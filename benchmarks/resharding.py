"""Resharding a checkpoint with its optimizer against `cp` of the same bytes, in one run on one disk.

    python benchmarks/resharding.py --work DIR [--size 1.3b] [--rounds 3] [--max-ram 512MiB]

Creates a checkpoint of random bytes in the form that training at TP2 x PP2 x DP2 writes. In each round, `cp -r` and
`convert_hf reshard --optimizer` to TP1 x PP4 x DP1 run in turn, each in its own process and with the input's pages
dropped from the cache first. Time is from start to the last byte on disk. Memory is the peak of anonymous pages, so the
page cache is not included. Absolute times mean little on a shared machine; compare the ratio to `cp` in the same round.

The result is checked before any figure is printed: every byte against the output's manifest, and each tensor's masters
and moments, as multisets of numbers, against the source's, without using the resharding code.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.conversion import Run, run_tool, spread  # noqa: E402
from megatron.checkpoint.discovery import LATEST, meta_file_name, tag_name  # noqa: E402
from megatron.checkpoint.manifest import FileEntry, Manifest, file_checksum, read_manifest, write_manifest  # noqa: E402
from megatron.checkpoint.optimizer_files import optimizer_file_name, write_optimizer_file  # noqa: E402
from megatron.checkpoint.state_ranges import ITEM, STATE_KINDS  # noqa: E402
from megatron.checkpoint.torch_files import write_tensors  # noqa: E402
from megatron.layout import LlamaShape, TensorRange, TensorSplit, layer_file_name, layer_files, rank_shape  # noqa: E402
from megatron.layout import row_of as row_of_tensor  # noqa: E402
from tools.convert_hf.stream.optimizer import rank_ranges  # noqa: E402

SAVED, WANTED = {"tp": 2, "pp": 2, "dp": 2}, {"tp": 1, "pp": 4, "dp": 1}
SIZES = {  # layers, hidden, MLP, heads, key/value heads, vocabulary
    "tiny": (4, 256, 1024, 8, 2, 4096),
    "0.5b": (8, 1536, 8192, 16, 8, 65536),
    "1.3b": (20, 2048, 8192, 32, 8, 65536),  # 1.22 billion parameters in decoder layers, 1.48 in all
}
STEP = 1000


def shape_of(size: str) -> LlamaShape:
    layers, hidden, mlp, heads, kv_heads, vocabulary = SIZES[size]
    return LlamaShape(layers, hidden, heads, kv_heads, mlp, vocabulary, vocabulary, tied=False)


class Noise:
    """Random bytes at the cost of a copy: windows at random offsets of one random buffer."""

    def __init__(self, largest: int) -> None:
        generator = np.random.default_rng(0)
        self.draw = random.Random(0)
        self.data = generator.integers(0, 256, largest + (1 << 20), dtype=np.uint8)

    def array(self, where: TensorRange, kind: str) -> memoryview:
        return self.bytes(len(where) * ITEM).data

    def bytes(self, count: int) -> np.ndarray:
        start = self.draw.randrange(1 << 20) & ~63
        return self.data[start : start + count]


def make_fixture(root: Path, shape: LlamaShape) -> None:
    """Write a bf16 checkpoint at layout SAVED. Weights do not match masters: resharding does not compare them."""
    folder, split = root / tag_name(STEP), TensorSplit(shape, SAVED["tp"])
    folder.mkdir(parents=True)
    noise = Noise(ITEM * max(split.numel(row) for _, _, rows in layer_files(shape) for row in rows))
    entries: dict[str, FileEntry] = {}
    for index, _, rows in layer_files(shape):
        copies = {row.neox: noise.bytes(2 * split.numel(row)).copy() for row in rows if row.replicated}
        for tp_rank in range(split.tp):
            name, tensors = layer_file_name(index, tp_rank), {}
            for row in rows:
                data = copies[row.neox] if row.replicated else noise.bytes(2 * split.numel(row)).copy()
                tensors[row.neox] = torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
                tensors[row.neox] = tensors[row.neox].view(rank_shape(row, shape, split.tp))
            entries[name] = write_tensors(folder / name, tensors)
    for rank, ranges in rank_ranges(split, SAVED["pp"], SAVED["dp"]).items():
        name = optimizer_file_name(rank)
        entries[name] = write_optimizer_file(folder / name, dict.fromkeys(ranges, STEP), noise.array)
    meta = {"module": None, "iteration": STEP, "args": {"num_attention_heads": shape.num_attention_heads}}
    for model_rank in range(SAVED["tp"] * SAVED["pp"]):
        name = meta_file_name(model_rank)
        torch.save(meta, folder / name)
        entries[name] = FileEntry((folder / name).stat().st_size, {}, file_checksum(folder / name))
    provenance = {
        "written_by": "training",
        "precision": "bfloat16",
        "layout": SAVED,
        "shape": dataclasses.asdict(shape),
        "optimizer": True,
        "config": {"make_vocab_size_divisible_by": 1},
    }
    write_manifest(folder, Manifest(entries, provenance))
    (root / LATEST).write_text(folder.name + "\n")


def digests(folder: Path, shape: LlamaShape) -> dict[tuple[int, str, str], tuple[int, int]]:
    """(XOR, sum) of the numbers of each tensor and kind of state, read as integers, whatever file they are in."""
    xors: dict[tuple[int, str, str], int] = defaultdict(int)
    sums: dict[tuple[int, str, str], int] = defaultdict(int)
    for name, entry in read_manifest(folder).files.items():
        for part in entry.ranges:
            where = part.where
            if row_of_tensor(where.layer, where.tensor, shape).replicated:
                continue  # as many copies as tensor-parallel ranks
            for kind in STATE_KINDS:
                offset, count = part.arrays[kind].offset, len(where)
                words = np.fromfile(folder / name, dtype="<u4", count=count, offset=offset)
                key = (where.layer, where.tensor, kind)
                xors[key] ^= int(np.bitwise_xor.reduce(words))
                sums[key] += int(words.sum(dtype=np.uint64))
    return {key: (xors[key], sums[key]) for key in xors}


def check(source: Path, target: Path, shape: LlamaShape) -> None:
    verify = [sys.executable, "-m", "megatron.checkpoint.verify", str(target), "--workers", "2"]
    subprocess.run(verify, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    one, other = (digests(root / tag_name(STEP), shape) for root in (source, target))
    if one != other:
        raise SystemExit(f"{target} does not hold the numbers of {source}; no figures")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the fixture and the outputs")
    parser.add_argument("--size", choices=SIZES, default="1.3b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--max-ram", default="512MiB")
    parser.add_argument("--json", type=Path, help="write every run to this file")
    options = parser.parse_args()
    shape, source, out = shape_of(options.size), options.work / f"saved_{options.size}", options.work / "out"
    if not (source / LATEST).exists():
        shutil.rmtree(source, ignore_errors=True)
        make_fixture(source, shape)
    layout = [word for name, size in WANTED.items() for word in (f"--{name}", str(size))]
    reshard = [sys.executable, str(ROOT / "tools/convert_hf"), "reshard", "--optimizer", "--input", str(source)]
    reshard += [
        "--output",
        str(out),
        *layout,
        "--threads",
        str(options.threads),
        "--max-ram",
        options.max_ram,
        "--quiet",
    ]
    tools = [("cp", ["cp", "-r", str(source), str(out)]), ("convert_hf reshard --optimizer", reshard)]
    runs: dict[str, list[Run]] = {name: [] for name, _ in tools}
    for number in range(options.rounds):
        done = {}
        for name, command in random.Random(number).sample(tools, len(tools)):
            done[name] = run_tool(name, command, source, out)
            if number == 0 and name != "cp":
                check(source, out, shape)
        for name, run in done.items():
            run.ratio = run.seconds / done["cp"].seconds
            runs[name].append(run)
            print(f"round {number + 1}: {name}: {run.seconds:.1f} s, {run.ratio:.2f} x cp", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    print_table(runs, options.size, shape)
    if options.json:
        everything = {name: [dataclasses.asdict(run) for run in all_] for name, all_ in runs.items()}
        options.json.write_text(json.dumps(everything, indent=1))
    return 0


def print_table(runs: dict[str, list[Run]], size: str, shape: LlamaShape) -> None:
    pick: dict[str, Callable[[Run], float]] = {
        "wall + sync, s": lambda r: r.seconds,
        "x cp": lambda r: r.ratio,
        "CPU, s": lambda r: r.cpu,
        "peak anonymous, MiB": lambda r: r.anonymous_mib,
        "read, GB": lambda r: r.read / 1e9,
        "written, GB": lambda r: r.written / 1e9,
        "output, GB": lambda r: r.output / 1e9,
    }
    text = " to ".join("TP{tp} PP{pp} DP{dp}".format(**layout) for layout in (SAVED, WANTED))
    print(f"\n{size}, {shape.num_parameters:,} parameters, {text}: median (least-most)\n")
    print("| tool | " + " | ".join(pick) + " |")
    print("|---" * (len(pick) + 1) + "|")
    for tool, all_ in runs.items():
        print(f"| {tool} | " + " | ".join(spread([value(run) for run in all_]) for value in pick.values()) + " |")


if __name__ == "__main__":
    sys.exit(main())
