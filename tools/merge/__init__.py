"""Merging models of the same shape: `python tools/merge --help`.

Imports go downwards in this list only:

- `cli`: the command line
- `verify`: recomputing a merge and comparing it with a folder
- `job`: checking and writing a merge
- `card`, `picture`: the model card, and a picture of the report
- `bands`: computing one band of the merged model from the same band of every parent
- `report`: norms, conflicts and angles of the parents' deltas
- `measure`: statistics of a whole tensor that a method needs before its first band
- `arithmetic`: the methods, on tiles
- `compatibility`, `parents`: the models to merge
- `recipe_file`, `averages`: reading a recipe from YAML
- `recipe`, `parameters`, `yaml_values`: a recipe, and its values in mergekit's notation
- `masks`: which elements DARE keeps
- `errors`

Files are read and written with the plans of `tools/convert_hf`. Needs torch, NumPy, safetensors, PyYAML and tqdm.
"""
