"""One optimizer file per rank: its layout, its writer with checksums, and the index by which it is read.

The files are safetensors, with one tensor for each array of each range, so that other programs can open them:
`{layer}.{tensor}.{tp_rank}.{start}.{kind}`, and `random_state`, JSON as bytes. This program reads byte ranges that the
manifest names, never the header.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpoint.manifest import FileEntry, Manifest, format_checksum
from megatron.checkpoint.state_ranges import ITEM, STATE_KINDS, StateRange, StoredArray, StoredBytes, block_bytes
from megatron.common.crc import combine, crc32
from megatron.common.errors import CheckpointError
from megatron.common.safetensors_header import header_bytes
from megatron.layout import TensorRange, TensorSplit, layer_files

RANDOM_STATE = "random_state"


def optimizer_file_name(rank: int) -> str:
    return f"rank_{rank:05d}_optim_states.safetensors"


# --- the layout of a file


@dataclass(frozen=True)
class FilePlan:
    """A file before it is written: its header, where each array begins, and its size.

    `arrays` holds (range, kind, offset) in file order; `random_state` is (offset, bytes).
    """

    header: bytes
    arrays: tuple[tuple[TensorRange, str, int], ...]
    random_state: tuple[int, int] | None
    size: int

    def index(
        self, steps: Mapping[TensorRange, int], checksums: Mapping[tuple[TensorRange, str], Sequence[int]]
    ) -> tuple[StateRange, ...]:
        """The file's ranges for the manifest; `checksums` are the CRC-32s of each array's blocks."""
        arrays: dict[TensorRange, dict[str, StoredArray]] = {}
        for where, kind, offset in self.arrays:
            arrays.setdefault(where, {})[kind] = StoredArray(offset, tuple(checksums[where, kind]))
        return tuple(StateRange(where, steps[where], found) for where, found in arrays.items())


def plan_file(ranges: Iterable[TensorRange], random_bytes: int = 0) -> FilePlan:
    """Lay out a file with the three arrays of each range, and `random_bytes` bytes of random states."""
    position, tensors, places = 0, {}, []
    for where in ranges:
        for kind in STATE_KINDS:
            end = position + len(where) * ITEM
            name = f"{where.layer}.{where.tensor}.{where.tp_rank}.{where.start}.{kind}"
            tensors[name] = {"dtype": "F32", "shape": [len(where)], "data_offsets": [position, end]}
            places.append((where, kind, position))
            position = end
    if random_bytes:
        end = position + random_bytes
        tensors[RANDOM_STATE] = {"dtype": "U8", "shape": [random_bytes], "data_offsets": [position, end]}
    header = header_bytes(tensors)
    arrays = tuple((where, kind, len(header) + offset) for where, kind, offset in places)
    random_state = (len(header) + position, random_bytes) if random_bytes else None
    return FilePlan(header, arrays, random_state, len(header) + position + random_bytes)


# --- writing one


def write_optimizer_file(
    path: Path,
    steps: Mapping[TensorRange, int],
    array: Callable[[TensorRange, str], memoryview],
    random_state: bytes = b"",
) -> FileEntry:
    """Write and sync the state of the ranges in `steps` (range -> updates done); returns the entry for the manifest.

    `array(range, kind)` returns the bytes of one array, fp32 and little-endian. Each block is checksummed once, and the
    file's checksum is combined from theirs. OSError with the file's name; CheckpointError if an array does not have the
    range's size, or the file's header or size is not as written. Memory: none beyond what `array` returns.
    """
    plan = plan_file(steps, len(random_state))
    checksums: dict[tuple[TensorRange, str], list[int]] = {}
    try:
        with open(path, "wb", buffering=0) as file:
            crc = _write(file.fileno(), plan.header)
            for where, kind, _ in plan.arrays:
                data = array(where, kind).cast("B")
                if len(data) != len(where) * ITEM:
                    raise CheckpointError(f"{path}: {kind} of {where} has {len(data)} bytes, not {len(where) * ITEM}")
                sums = checksums[where, kind] = []
                for block in _blocks(data):
                    sums.append(_write(file.fileno(), block))
                    crc = combine(crc, sums[-1], len(block))
            random_crc = _write(file.fileno(), random_state)
            crc = combine(crc, random_crc, len(random_state))
            os.fsync(file.fileno())
        with open(path, "rb") as file:
            if file.read(len(plan.header)) != plan.header or os.fstat(file.fileno()).st_size != plan.size:
                raise CheckpointError(f"{path} is not what was written into it")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    stored = None if plan.random_state is None else StoredBytes(*plan.random_state, random_crc)
    return FileEntry(plan.size, {}, format_checksum(crc), plan.index(steps, checksums), stored)


def _blocks(data: memoryview) -> Iterator[memoryview]:
    for first in range(0, len(data), block_bytes()):
        yield data[first : first + block_bytes()]


def _write(descriptor: int, data: bytes | memoryview) -> int:
    """Write all of it; returns its CRC-32."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.write(descriptor, view[done:])
    return crc32(view)


# --- the index of a checkpoint


@dataclass(frozen=True)
class PlacedRange:
    """A range of the index and the file that holds it."""

    file: str
    state: StateRange


class OptimizerIndex:
    """Which file of a checkpoint holds which part of the optimizer's state; `split` is how its ranges are cut."""

    def __init__(self, files: Mapping[str, Sequence[StateRange]], split: TensorSplit) -> None:
        self.split = split
        self._by_tensor: dict[tuple[int, str, int], list[PlacedRange]] = {}
        for file, ranges in files.items():
            for state in ranges:
                where = state.where
                self._by_tensor.setdefault((where.layer, where.tensor, where.tp_rank), []).append(
                    PlacedRange(file, state)
                )
        for placed in self._by_tensor.values():
            placed.sort(key=lambda part: part.state.where.start)

    @classmethod
    def of(cls, manifest: Manifest, split: TensorSplit) -> OptimizerIndex:
        return cls({name: entry.ranges for name, entry in manifest.files.items() if entry.ranges}, split)

    def overlapping(self, layer: int, tensor: str, tp_rank: int, start: int, stop: int) -> Iterator[PlacedRange]:
        """The stored ranges that hold some of the elements `start:stop` of a rank's tensor."""
        for placed in self._by_tensor.get((layer, tensor, tp_rank), ()):
            if placed.state.where.start < stop and start < placed.state.where.stop:
                yield placed

    def step(self, layer: int, tensor: str) -> int:
        """How many updates a tensor has seen; the same for all of its ranges, as `problems` checks."""
        return self._by_tensor[layer, tensor, 0][0].state.step

    def problems(self) -> list[str]:
        """What is missing, held twice or not of the model; empty if the files hold each element exactly once."""
        expected: dict[tuple[int, str, int], int] = {}
        for layer, _, rows in layer_files(self.split.shape):
            for row in rows:
                numel = self.split.numel(row)
                expected |= {(layer, row.neox, tp_rank): numel for tp_rank in range(self.split.tp)}
        problems = [
            f"{placed[0].file} holds layer {key[0]} {key[1]} of tensor rank {key[2]}, which the model does not have"
            for key, placed in self._by_tensor.items()
            if key not in expected
        ]
        for (layer, tensor, tp_rank), numel in expected.items():
            placed, position = self._by_tensor.get((layer, tensor, tp_rank), []), 0
            steps = {part.state.step for part in self._by_tensor.get((layer, tensor, 0), [])}
            steps |= {part.state.step for part in placed}
            for part in placed:
                if part.state.where.start != position:
                    break
                position = part.state.where.stop
            else:
                if position == numel and len(steps) == 1:
                    continue
            what = f"layer {layer} {tensor} of tensor rank {tp_rank}"
            if len(steps) > 1:
                problems.append(f"{what} is of steps {', '.join(map(str, sorted(steps)))}")
            else:
                problems.append(f"the optimizer state of {what} is not there once from element {position} to {numel}")
        return problems
