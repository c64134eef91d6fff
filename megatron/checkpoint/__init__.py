"""Checkpoints: complete or absent, every tensor accounted for, opened without running code.

`docs/checkpoints.md` describes the files. `manifest` and `discovery` are free of torch, for tools on a login node.
"""
