"""Errors of the parts below the trainer that a user causes and can mend: the entry points print their text alone.

They do not derive from `UserError`, because tools on a login node raise them where pydantic is not installed.
"""

from megatron.checkpoint.errors import CheckpointError
from megatron.data import DataError
from megatron.ops.library import KernelsUnavailable
from megatron.tokenizer import TokenizerError

USER_ERRORS = (CheckpointError, DataError, KernelsUnavailable, TokenizerError)
