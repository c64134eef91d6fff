"""Training data: token files, their order, blends, and the micro-batches of a rank.

The names are imported when first used: the data commands need the file format but not torch, and start at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.data.build import DataArgs, Datasets, build_datasets
    from megatron.data.header import fingerprint
    from megatron.data.indexed import DataError
    from megatron.data.sample import Sample, SampleDataset, stack
    from megatron.data.sampler import MicroBatches

_MODULES = {
    "DataArgs": "build",
    "DataError": "indexed",
    "Datasets": "build",
    "MicroBatches": "sampler",
    "Sample": "sample",
    "SampleDataset": "sample",
    "build_datasets": "build",
    "fingerprint": "header",
    "stack": "sample",
}

__all__ = [
    "DataArgs",
    "DataError",
    "Datasets",
    "MicroBatches",
    "Sample",
    "SampleDataset",
    "build_datasets",
    "fingerprint",
    "stack",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
