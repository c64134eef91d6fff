"""The Llama decoder: modules, the pipeline they form, and `layout`, the table of every tensor on disk.

You are here: neox_arguments -> launcher -> **model** -> trainer -> checkpoint. Nothing is imported on package
import, so that `megatron.layout` stays free of torch for tools on a login node.
"""
