"""Lets megatron-core, which hard-codes "cuda" in allocations, run on a CPU or on torch's "meta" device.

On a GPU nothing is changed. Elsewhere, and only inside `on_device`, torch's functions interpret "cuda" as the current
device, and `Tensor.type()` returns CUDA's names, which megatron-core's optimizer compares with. A schedule names "cuda"
once, for its token counter: `schedule_on` changes only that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from megatron.core.pipeline_parallel import schedules
from torch.overrides import TorchFunctionMode


class _CudaNames(TorchFunctionMode):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs = {**kwargs, "device": self.device}
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return "torch.cuda." + result.rpartition(".")[2]
        return result


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Context in which megatron-core's "cuda" means `device`."""
    if device.type == "cuda":
        yield
        return
    with _CudaNames(device), mock.patch.object(torch.cuda, "current_device", return_value=device):
        yield


class _TorchOfSchedules:
    """Stands in for `torch` in megatron-core's schedules, with a `zeros` on the current device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, size: Any, dtype: torch.dtype, device: str) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=self._device if device == "cuda" else device)


@contextlib.contextmanager
def schedule_on(device: torch.device) -> Iterator[None]:
    """Context in which megatron-core's schedules run on `device`."""
    if device.type == "cuda":
        yield
        return
    with mock.patch.object(schedules, "torch", _TorchOfSchedules(device)):
        yield
