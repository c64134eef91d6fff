"""HF <-> GPT-NeoX conversion at disk speed: `python tools/convert_hf --help`.

Reading order: `regions` (what a plan is made of), `opening` (what kinds of checkpoint exist), `targets` (the files to
write), `planning`, `copying`, `publishing`. Only casts (`--dtype`) and `verify` need torch; nothing needs transformers,
DeepSpeed or megatron-core.
"""
