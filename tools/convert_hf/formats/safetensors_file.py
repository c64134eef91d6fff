"""The safetensors format: strict reading of headers and layout of new files, without loading a tensor.

A file consists of the header's length (u64, little-endian), the header (JSON) and the data. Every header entry gives
dtype, shape and the half-open byte range of one tensor within the data; ranges must cover the data without gaps or
overlaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron.common.safetensors_header import header_bytes

from ..errors import ConvertError
from .dtypes import BY_SAFETENSORS, DType
from .stored import Shape, Stored

MAX_HEADER = 100_000_000  # the limit of the safetensors library
MAX_DIMENSIONS = 8


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ConvertError(f"the name {key!r} appears twice")
        result[key] = value
    return result


def read_json(text: str | bytes, where: str) -> Any:
    """Parse JSON and reject duplicate names; ConvertError names `where`."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except ConvertError as error:
        raise ConvertError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{where} is not valid JSON: {error}") from None


def is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_safetensors_header(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file by name. ConvertError if the header is inconsistent."""
    try:
        with open(path, "rb") as file:
            total = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(total - 8, MAX_HEADER):
                raise ConvertError(
                    f"{path} is truncated or not a safetensors file ({total} bytes, header length {length}); "
                    f"copy it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error.strerror or error}") from None
    header = read_json(raw, f"{path}: the header")
    if not isinstance(header, dict):
        raise ConvertError(f"{path}: the header must be a JSON object, not {type(header).__name__}")
    start, tensors = 8 + length, {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        stored = _entry(path, name, entry, start, total)
        tensors[name] = stored
    position = start
    for stored in sorted(tensors.values(), key=lambda s: (s.offset, s.nbytes)):
        if stored.offset != position:
            kind = "overlaps its neighbor" if stored.offset < position else "leaves a gap before it"
            raise ConvertError(f"{path}: tensor {stored.name} {kind}; the file is corrupt, copy it again")
        position += stored.nbytes
    if position != total:
        raise ConvertError(f"{path}: tensors end at byte {position} of {total}; the file is truncated or corrupt")
    return tensors


def _entry(path: Path, name: str, entry: Any, start: int, total: int) -> Stored:
    where = f"{path}: tensor {name}"
    if not isinstance(entry, dict):
        raise ConvertError(f"{where} must be described by a JSON object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BY_SAFETENSORS:
        raise ConvertError(f"{where} has dtype {dtype!r}; known are {', '.join(BY_SAFETENSORS)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(is_size(n) for n in shape):
        raise ConvertError(f"{where} has no valid shape: {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_size(n) for n in offsets):
        raise ConvertError(f"{where} has no valid data_offsets: {str(offsets)[:80]}")
    stored = Stored(path, name, start + offsets[0], BY_SAFETENSORS[dtype], tuple(shape))
    if offsets[0] + stored.nbytes != offsets[1]:
        raise ConvertError(
            f"{where}: shape {shape} of {dtype} needs {stored.nbytes} bytes, its range has {offsets[1] - offsets[0]}"
        )
    if start + offsets[1] > total:
        raise ConvertError(f"{where} ends beyond the end of the file; it is truncated, copy it again")
    return stored


def file_layout(tensors: Iterable[tuple[str, DType, Shape]]) -> tuple[bytes, dict[str, int], int]:
    """Header bytes, byte offset of each tensor and total size of a file with these tensors in this order.

    The data begin at a multiple of 64 bytes; metadata is `{"format": "pt"}`, which older `transformers` require.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, position = {}, 0
    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * dtype.itemsize
        offsets[name] = position
        entries[name] = {
            "dtype": dtype.safetensors,
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        position += nbytes
    header = header_bytes(entries)
    start = len(header)
    return header, {name: start + offset for name, offset in offsets.items()}, start + position
