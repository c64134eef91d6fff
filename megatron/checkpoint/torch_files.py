"""Torch files: written with a running checksum and synced, read as tensors and plain values only."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import threading
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from megatron.checkpoint.manifest import FileEntry, TensorEntry, checksum, format_checksum
from megatron.common.crc import crc32
from megatron.common.errors import CheckpointError

_REGISTRY = threading.Lock()  # torch's list of allowed classes is global, and a background save uses it from its thread


class _Sink:
    """File object for torch.save that checksums what it writes, and keeps the first error of the operating system.

    torch's zip writer reports a failed write as an error about positions; the reason (no space left) is kept here.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  (closed by write_file; buffers would fail late)
        self.crc = 0
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.crc = crc32(view, self.crc)
        self.size += len(view)
        done = 0
        try:
            while done < len(view):
                done += self._file.write(view[done:])
        except OSError as error:
            self.error = self.error or error
            raise
        return len(view)

    def flush(self) -> None:
        pass  # nothing is buffered

    def close(self, sync: bool) -> None:
        try:
            if sync:
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def write_file(path: Path, content: Any, classes: Sequence[type] = ()) -> FileEntry:
    """Save `content` at `path`, synced, and read its structure back; the entry holds size and checksum.

    Raises OSError with the file's name and the system's reason, CheckpointError if the content could not be read back
    without running code. Memory: none beyond `content`.
    """
    sink = None
    try:
        sink = _Sink(path)
        torch.save(content, cast(IO[bytes], sink))
        sink.close(sync=True)
    except Exception as error:
        cause = (sink.error if sink is not None else None) or error
        if sink is not None:
            with contextlib.suppress(OSError):
                sink.close(sync=False)
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise CheckpointError(f"{path} cannot be written: {type(cause).__name__}: {cause}") from error
    read_file(path, lazy=True, classes=classes)
    return FileEntry(sink.size, {}, format_checksum(sink.crc))


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> FileEntry:
    """Save a flat dict of tensors, each in storage of its own so that the file holds no other bytes.

    Memory: a copy of those that lie on a GPU or inside a larger storage.
    """
    own = {name: _alone(tensor.detach()) for name, tensor in tensors.items()}
    entry = write_file(path, own)
    return FileEntry(entry.bytes, {name: tensor_entry(tensor) for name, tensor in own.items()}, entry.checksum)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, the only one in its storage."""
    if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.to("cpu", copy=True).contiguous()


def tensor_checksum(tensor: Tensor) -> str:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return checksum(raw.data)


def tensor_entry(tensor: Tensor) -> TensorEntry:
    return TensorEntry(tuple(tensor.shape), dtype_name(tensor.dtype), tensor_checksum(tensor))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_file(path: Path, lazy: bool = False, classes: Sequence[type | tuple[type, str]] = ()) -> Any:
    """Load a torch file on the CPU, without executing anything in it.

    With `lazy` tensors are mapped from the file and read when used. CheckpointError if the file is damaged or asks for
    anything but tensors, plain values and instances of `classes`; a pair is a class and the name that it stands in for.
    """
    try:
        # GPT-NeoX's older files are plain pickles, which cannot be mapped.
        mapped = lazy and zipfile.is_zipfile(path)
        with _only_these_globals(classes):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True if mapped else None)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            raise CheckpointError(
                f"{path} asks for {named[1]}: a checkpoint may hold tensors and plain values only, "
                f"and nothing of this file is loaded"
            ) from error
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}") from error
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or truncated: {_first_line(error)}") from error


@contextlib.contextmanager
def _only_these_globals(classes: Sequence[type | tuple[type, str]]) -> Iterator[None]:
    """Allow `classes` and nothing that a library has registered: megatron-core adds sixteen of its own on import."""
    with _REGISTRY:
        registered = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            torch.serialization.add_safe_globals(list(classes))
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(registered)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__


@dataclass(frozen=True)
class Header:
    """Shape and dtype name of one tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: str


def read_headers(path: Path) -> dict[str, Header]:
    """Tensors of a layer file by name; CheckpointError if it is not a flat dict of tensors.

    megatron-core's linears leave `_extra_state: None` beside a weight; such entries without a tensor are left out.
    """
    return {name: Header(tuple(t.shape), dtype_name(t.dtype)) for name, t in read_tensors(path).items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a layer file, mapped from disk."""
    content = read_file(path, lazy=True)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dict of tensors")
    tensors = {}
    for name, value in content.items():
        if str(name).endswith("_extra_state") and value is None:
            continue
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name} is a {type(value).__name__}, expected a tensor")
        tensors[str(name)] = value
    return tensors
