"""YAML -> `NeoXArgs`: typed keys, merging, derived values, checks, and what DeepSpeed gets.

You are here: **neox_arguments** -> launcher -> model -> trainer -> checkpoint. Imports neither torch nor deepspeed, so
that a configuration can be checked on a login node in a second.
"""

from megatron.common.errors import ConfigError
from megatron.neox_arguments.arguments import NeoXArgs

__all__ = ["ConfigError", "NeoXArgs"]
