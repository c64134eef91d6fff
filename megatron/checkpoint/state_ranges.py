"""What the manifest records of a rank's optimizer file: its ranges, their offsets, and checksums of every block.

A file holds, for each range of a tensor, three fp32 arrays: master weights, first and second moments. Each array is
checksummed in blocks of `BLOCK` elements from its start, so that a part can be verified without reading the rest.
Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.layout import TensorRange

STATE_KINDS = ("master", "exp_avg", "exp_avg_sq")
ITEM = 4  # bytes of an element: fp32
BLOCK = 1 << 20  # elements: 4 MiB; what a reader reads at a time

_CHECKSUMS = re.compile(r"[0-9a-f]{8}( [0-9a-f]{8})*")


@dataclass(frozen=True)
class StoredArray:
    """One array of a range: its first byte in the file, and the CRC-32 of each block.

    DeepSpeed's files have no checksums, and their moments may be of gradients scaled by a constant: an element's value
    is `factor` times what is stored.
    """

    offset: int
    checksums: tuple[int, ...] = ()
    factor: float = 1.0


@dataclass(frozen=True)
class StateRange:
    """The optimizer state of a range after `step` updates; `arrays` is by the names in STATE_KINDS."""

    where: TensorRange
    step: int
    arrays: Mapping[str, StoredArray]

    def blocks(self) -> range:
        return range(blocks_of(len(self.where)))

    def block(self, number: int) -> tuple[int, int]:
        """The elements of the tensor that a block holds, as (first, end)."""
        first = self.where.start + number * BLOCK
        return first, min(first + BLOCK, self.where.stop)

    def to_json(self) -> dict[str, Any]:
        where = self.where
        body: dict[str, Any] = {
            "layer": where.layer,
            "tensor": where.tensor,
            "tp_rank": where.tp_rank,
            "start": where.start,
            "stop": where.stop,
            "step": self.step,
        }
        for kind, array in self.arrays.items():
            sums = " ".join(f"{checksum:08x}" for checksum in array.checksums)
            body[kind] = {"offset": array.offset, "crc32": sums}
        return body

    @classmethod
    def from_json(cls, value: Any, file_bytes: int) -> StateRange:
        """Parse an entry of a file of `file_bytes` bytes; ValueError says what is wrong."""
        if not isinstance(value, Mapping):
            raise ValueError(f"a range must be a mapping, got {type(value).__name__}")
        for key in ("layer", "tp_rank", "start", "stop", "step"):
            if not _is_size(value.get(key)):
                raise ValueError(f"a range's {key} must be an integer of at least 0, got {value.get(key)!r}")
        name, start, stop = value.get("tensor"), value["start"], value["stop"]
        if not isinstance(name, str) or not start < stop:
            raise ValueError(f"a range needs a tensor and start < stop, got {name!r}, {start}, {stop}")
        where = TensorRange(value["layer"], name, value["tp_rank"], start, stop)
        arrays = {kind: _array(value.get(kind), where, kind, file_bytes) for kind in STATE_KINDS}
        return cls(where, value["step"], arrays)


@dataclass(frozen=True)
class StoredBytes:
    """Bytes of a file with their CRC-32: the random states of a rank, as JSON."""

    offset: int
    size: int
    crc: int

    def to_json(self) -> dict[str, Any]:
        return {"offset": self.offset, "bytes": self.size, "crc32": f"{self.crc:08x}"}

    @classmethod
    def from_json(cls, value: Any, file_bytes: int) -> StoredBytes:
        if not isinstance(value, Mapping) or not _is_size(value.get("offset")) or not _is_size(value.get("bytes")):
            raise ValueError(f"random_state needs an offset and bytes, got {value!r}")
        (crc,) = _checksums(value.get("crc32"), 1, "random_state")
        if value["offset"] + value["bytes"] > file_bytes:
            raise ValueError("random_state ends beyond the end of the file")
        return cls(value["offset"], value["bytes"], crc)


def block_bytes() -> int:
    return BLOCK * ITEM


def blocks_of(elements: int) -> int:
    return -(-elements // BLOCK)


def _array(value: Any, where: TensorRange, kind: str, file_bytes: int) -> StoredArray:
    what = f"{kind} of {where}"
    if not isinstance(value, Mapping) or not _is_size(value.get("offset")):
        raise ValueError(f"{what} needs an offset, got {value!r}")
    if value["offset"] + len(where) * ITEM > file_bytes:
        raise ValueError(f"{what} ends beyond the end of the file")
    return StoredArray(value["offset"], _checksums(value.get("crc32"), blocks_of(len(where)), what))


def _checksums(value: Any, count: int, what: str) -> tuple[int, ...]:
    if not isinstance(value, str) or not _CHECKSUMS.fullmatch(value) or len(value.split()) != count:
        raise ValueError(f"{what}: crc32 must be {count} words of eight hexadecimal digits, got {str(value)[:60]!r}")
    return tuple(int(word, 16) for word in value.split())


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
