"""What a layout costs, before it costs anything: memory, time and communication of every stage, without hardware.

Numbers of parameters come from the real model on meta tensors, machine constants from one file with their sources.
"""
