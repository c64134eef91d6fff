"""HF <-> GPT-NeoX conversion at disk speed: `python tools/convert_hf --help`.

Imports go downwards in this list only:

- `cli`, `commands`: the command line, and one module per verb
- `verify`: comparing two checkpoints
- `sources`: opening a checkpoint of any kind
- `stream`: copying the tensors of an opened checkpoint to the files of another
- `formats`: safetensors and torch's zip files
- `errors`

Reading order: `stream/tensor_map` (the parts of a plan), `sources/opening` (the supported kinds of checkpoint),
`stream/targets` (the files to write), `stream/plan`, `stream/copy`, `stream/publish`. Only casts (`--dtype`),
`--adapter` and `verify` need torch; nothing needs transformers, DeepSpeed or megatron-core.
"""
