"""Merging of models that share a shape: `python tools/merge --help`.

Imports go downwards in this list only:

- `cli`: the command line
- `job`, `verify`: what a merge writes, and its recomputation
- `card`, `picture`: what is told about a merge
- `bands`: one band of the merged model from the same band of every parent
- `report`: norms, conflicts and angles of the parents' deltas
- `measure`: what a method must know of a whole tensor before its first band
- `arithmetic`: the methods, on tiles
- `compatibility`, `parents`, `adapters`: the models that are merged
- `recipe`, `parameters`: mergekit's YAML
- `masks`: which elements DARE keeps
- `errors`

Files are read and written by the plan of `tools/convert_hf`. It needs torch, NumPy, safetensors, PyYAML and tqdm.
"""
