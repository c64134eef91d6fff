"""The image importer compared with a plain PIL loop in one process: ratios of wall time, and peak memory.

    python benchmarks/images.py [--images 4000] [--side 512] [--repeats 3] [--folder /dev/shm]

Both decode the same JPEG files and write the pixels of all into one file, synced to disk; the importer also checks
shapes, accumulates moments and a checksum, and writes index, header and properties. One loop per core, each over a part
of the pictures, shows what the machine allows. The importer's time includes its start, measured with a single picture;
the speed without it is shown as well. Its peak memory is measured on half the images and on all.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def write_pictures(folder: Path, count: int, side: int) -> None:
    """Write JPEGs of smooth noise, which compresses about as well as survey pictures."""
    from PIL import Image

    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        small = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)
        noisy = np.asarray(picture, np.int16) + rng.integers(-8, 8, (side, side, 3), dtype=np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:06d}.jpg", quality=90)


def plain_loop(paths: Sequence[Path], output: Path) -> None:
    """Write all pixels to one file, with the loop that a reader of PIL's tutorial would write."""
    from PIL import Image

    with output.open("wb") as file:
        for path in paths:
            with Image.open(path) as picture:
                file.write(np.asarray(picture.convert("RGB")).tobytes())
        os.fsync(file.fileno())


@dataclass(frozen=True)
class Cost:
    """Wall seconds, and CPU seconds summed over all cores."""

    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.wall:.2f} s (CPU {self.cpu:.2f} s)"


def measured(work: Callable[[], object]) -> Cost:
    """The cost of `work`, including the processes that it starts and waits for."""

    def cpu() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)

    start, before = time.perf_counter(), cpu()
    work()
    return Cost(time.perf_counter() - start, cpu() - before)


def loops_at_once(paths: Sequence[Path], folder: Path, count: int) -> None:
    context = multiprocessing.get_context("fork")
    parts = [paths[number::count] for number in range(count)]
    running = [
        context.Process(target=plain_loop, args=(part, folder / f"loop{number}.bin"))
        for number, part in enumerate(parts)
    ]
    for one in running:
        one.start()
    for one in running:
        one.join()


def importer(folder: Path, prefix: Path, workers: int) -> float:
    """Run the importer; returns the peak MB of the largest child process so far."""
    words = [sys.executable, ROOT / "tools/datasets/preprocess_images.py", "--input", folder]
    words += ["--output-prefix", prefix, "--workers", str(workers)]
    subprocess.run(list(map(str, words)), check=True, stderr=subprocess.DEVNULL)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write all files (default: the temporary folder)")
    options = parser.parse_args()
    workers = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for part, count in (("one", 1), ("half", options.images // 2), ("all", options.images)):
            write_pictures(folder / part, count, options.side)
        half_memory = importer(folder / "half", folder / "out/half", workers)  # also fills the caches
        paths, ratios = sorted((folder / "all").iterdir()), []
        for _ in range(options.repeats):  # in turn, so that other load on the machine affects all alike
            loop = measured(lambda: plain_loop(paths, folder / "loop.bin"))
            at_once = measured(lambda: loops_at_once(paths, folder, workers))
            start = measured(lambda: importer(folder / "one", folder / "out/one", workers))
            command = measured(lambda: importer(folder / "all", folder / "out/all", workers))
            ratios.append([loop.wall / one for one in (command.wall, command.wall - start.wall, at_once.wall)])
            print(f"loop {loop}, {workers} loops {at_once}, {workers} workers {command}, including the start {start}")
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        same = (folder / "loop.bin").read_bytes() == (folder / "out/all.bin").read_bytes()
    for what, values in zip(("the importer", "without its start", f"{workers} loops"), zip(*ratios), strict=True):  # noqa: B905
        print(f"{what}: {np.median(values):.2f} times as fast ({min(values):.2f} to {max(values):.2f})")
    print(
        f"same bytes: {same}; largest process {half_memory:.0f} MB for {options.images // 2} images, "
        f"{memory:.0f} MB for {options.images}"
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
