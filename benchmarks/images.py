"""The importer of images against one process that does the same with PIL in a loop: a ratio, and peak memory.

    python benchmarks/images.py [--images 4000] [--side 512] [--repeats 3]

Both decode the same JPEG files and write their bytes one behind the other; the importer also checks shapes, sums up
moments and a checksum, and writes index, header and properties. Its memory is looked at again with twice the images.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def write_pictures(folder: Path, count: int, side: int) -> None:
    """Smooth noise, which JPEG compresses about as survey pictures are."""
    from PIL import Image

    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        small = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)
        noisy = np.asarray(picture, np.int16) + rng.integers(-8, 8, (side, side, 3), dtype=np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:06d}.jpg", quality=90)


def plain_loop(folder: Path, output: Path) -> float:
    """Seconds of the loop that a reader of PIL's tutorial would write."""
    from PIL import Image

    start = time.perf_counter()
    with output.open("wb") as file:
        for path in sorted(folder.iterdir()):
            with Image.open(path) as picture:
                file.write(np.asarray(picture.convert("RGB")).tobytes())
    return time.perf_counter() - start


def importer(folder: Path, prefix: Path, workers: int) -> tuple[float, float]:
    """(seconds, peak MB of its largest process) of the command, its start included."""
    words = [sys.executable, ROOT / "tools/datasets/preprocess_images.py", "--input", folder]
    words += ["--output-prefix", prefix, "--workers", str(workers)]
    start = time.perf_counter()
    subprocess.run(list(map(str, words)), check=True, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    workers = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder / "half", options.images // 2, options.side)
        write_pictures(folder / "all", options.images, options.side)
        _, half_memory = importer(folder / "half", folder / "out/half", workers)  # also fills the caches
        ratios = []
        for _ in range(options.repeats):  # in turn, so that what else runs on the machine meets both
            loop = plain_loop(folder / "all", folder / "loop.bin")
            seconds, memory = importer(folder / "all", folder / "out/all", workers)
            ratios.append(loop / seconds)
            print(f"loop {loop:.2f} s, {workers} workers {seconds:.2f} s: {loop / seconds:.2f} times as fast")
        same = (folder / "loop.bin").read_bytes() == (folder / "out/all.bin").read_bytes()
    print(
        f"median {np.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f}); same bytes: {same}; "
        f"largest process {half_memory:.0f} MB for {options.images // 2} images, {memory:.0f} MB for {options.images}"
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
