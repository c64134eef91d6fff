"""The cost of a layout before anything runs: memory, time and communication of every stage, without hardware.

Parameter counts come from the real model on meta tensors, machine constants from one file that names their sources.
"""
