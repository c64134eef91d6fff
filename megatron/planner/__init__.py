"""What a layout costs, before it costs anything: memory, time and communication of every stage, without hardware.

You are here: neox_arguments -> **planner** (beside the launcher; it starts nothing). Numbers of parameters come from
the real model on meta tensors, machine constants from one file with their sources.
"""
