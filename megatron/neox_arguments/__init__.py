"""YAML -> `NeoXArgs`: typed keys, merging, derived values, rules, and what DeepSpeed gets.

`keys/` has a file per group of keys: their types and descriptions, how values that are left out are derived, and the
rules they must keep. Neither torch nor deepspeed is imported, so that a configuration can be checked on a login node in
a second.
"""

from megatron.common.errors import ConfigError
from megatron.neox_arguments.arguments import NeoXArgs

__all__ = ["ConfigError", "NeoXArgs"]
