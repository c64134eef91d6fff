"""Checkpoints: complete or absent, every tensor accounted for, opened without running code.

You are here: neox_arguments -> launcher -> model -> trainer -> **checkpoint**. Nothing is imported on package import,
so that `manifest` and `folders` stay free of torch for tools on a login node. The trainer uses `save.save_checkpoint`,
`load.load_checkpoint` and `state.TrainState`; `docs/checkpoints.md` describes the files.
"""
