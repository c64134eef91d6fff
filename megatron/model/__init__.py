"""The Llama decoder: modules, the numbered layers they form, their loss, and weights to start from.

You are here: neox_arguments -> launcher -> **model** -> trainer -> checkpoint. `megatron.layout` is the table of the
tensors.
"""
