"""Counts the bytes of live tensors, as a GPU's allocator does, on devices without such a counter."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While active: `now`, the bytes of all live storages created since entry, and their `peak`.

    A storage is counted once regardless of the number of views, from its creation until its last reference is gone, and
    with its current size if it was resized. Temporaries inside an operation are not seen; a GPU's caching allocator
    sees them, and rounds each block up to 512 bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._refs: dict[int, weakref.ref] = {}
        self._sizes: dict[int, int] = {}

    def __enter__(self) -> LiveBytes:
        self._resize = resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in self._sizes:
                self._add(size - self._sizes[storage._cdata])
                self._sizes[storage._cdata] = size
            return result

        torch.UntypedStorage.resize_ = counted  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *arguments: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*arguments)

    def reset_peak(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._refs:
            return
        self._sizes[key] = storage.nbytes()

        def gone(_: Any) -> None:
            self.now -= self._sizes.pop(key)
            del self._refs[key]

        self._refs[key] = weakref.ref(storage, gone)
        self._add(self._sizes[key])

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)
