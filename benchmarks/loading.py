"""The cost of verifying checksums on load: layer files into a model's tensors, alternating with and without checksums.

    python benchmarks/loading.py [--folder DIR] [--files 4] [--mebibytes 128] [--rounds 5] [--write PAGE]

Cold: the files' pages are dropped from the cache before each load (posix_fadvise), so that they are read from disk.
Warm: they are in memory. One process, one torch thread; checksums run in a separate thread. The floor is one
sequential read of the same bytes. The CPU time of all threads shows the cost on a machine whose other cores are busy,
where loading and checksums run one after the other.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron.checkpoint.manifest import FileEntry  # noqa: E402
from megatron.checkpoint.torch_files import read_tensors, write_tensors  # noqa: E402
from megatron.checkpoint.verified import verified_tensors  # noqa: E402
from megatron.common.crc import crc32  # noqa: E402

MARKER = "loading"


def load(paths: Sequence[Path], entries: Sequence[FileEntry | None], targets: Sequence[dict[str, Tensor]]) -> None:
    """Load as `load_layers` does."""
    for path, entry, target in zip(paths, entries, targets, strict=True):
        stored = read_tensors(path)
        with verified_tensors(path, entry, stored):
            for name, tensor in target.items():
                tensor.copy_(stored[name])


def read_through(paths: Sequence[Path]) -> None:
    buffer = bytearray(1 << 22)
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        while os.readv(descriptor, [buffer]):
            pass
        os.close(descriptor)


def drop_cache(paths: Sequence[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def seconds(function: Callable[[], None]) -> tuple[float, float]:
    """(wall time, CPU time of all threads)."""
    begun = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - begun[0], time.process_time() - begun[1]


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, help="folder on the file system to measure (default: a temporary folder)"
    )
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--mebibytes", type=int, default=128, help="size of each file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", type=Path, help="replace the table between the markers of this page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = 4
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        paths, entries, targets = [], [], []
        for number in range(options.files):
            shape = (rows, options.mebibytes * (1 << 20) // 2 // rows // 2)
            tensors = {f"tensor{i}": torch.randn(shape).to(torch.bfloat16) for i in range(2)}
            paths.append(Path(folder) / f"layer_{number:02d}.pt")
            entries.append(write_tensors(paths[-1], tensors))
            targets.append({name: torch.empty_like(tensor) for name, tensor in tensors.items()})
        size = sum(entry.bytes for entry in entries)
        nothing: list[FileEntry | None] = [None] * len(entries)
        ways: dict[str, Callable[[], None]] = {
            "without": partial(load, paths, nothing, targets),
            "with": partial(load, paths, entries, targets),
            "floor": partial(read_through, paths),
        }
        table = [
            "| cache | without checksums | with | ratio | one read of the bytes | CPU time without, with |",
            "|---|---|---|---|---|---|",
        ]
        for cache in ("cold", "warm"):
            taken: dict[str, list[float]] = {way: [] for way in ways}
            busy: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(options.rounds):
                for way, function in ways.items():
                    if cache == "cold":
                        drop_cache(paths)
                    wall, cpu = seconds(function)
                    taken[way].append(wall)
                    busy[way].append(cpu)
            ratio = statistics.median(taken["with"]) / statistics.median(taken["without"])
            cells = [cache, spread(taken["without"]), spread(taken["with"]), f"{ratio:.2f}", spread(taken["floor"])]
            cells.append(", ".join(f"{statistics.median(busy[way]):.2f} s" for way in ("without", "with")))
            table.append(f"| {' | '.join(cells)} |")
    summed = "zlib" if crc32 is zlib.crc32 else "isal"
    print(f"{size / 1e9:.2f} GB in {options.files} files, {options.rounds} rounds, {os.cpu_count()} cores, {summed}")
    print("\n".join(table))
    if options.write:
        text = options.write.read_text()
        begin, end = f"<!-- {MARKER}:begin -->", f"<!-- {MARKER}:end -->"
        head, rest = text.split(begin)
        what = f"{size / 1e9:.2f} GB in {options.files} files, medians and ranges of {options.rounds} rounds"
        caption = f"{what}, {os.cpu_count()} cores, CRC-32 by {summed}:\n\n"
        options.write.write_text(f"{head}{begin}\n{caption}" + "\n".join(table) + f"\n{end}{rest.split(end)[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
