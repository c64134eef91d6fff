"""Lets megatron-core, which names "cuda" where it allocates, run on a CPU or on torch's "meta" device.

On a GPU nothing is changed. Elsewhere, and only inside `on_device`, torch's functions take "cuda" for the device at
hand, and a tensor's type is called by CUDA's name, which is what megatron-core's optimizer compares with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
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
    """Inside, megatron-core's "cuda" is `device`."""
    if device.type == "cuda":
        yield
        return
    with _CudaNames(device), mock.patch.object(torch.cuda, "current_device", return_value=device):
        yield
