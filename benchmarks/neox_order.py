"""The order of samples with `data_order: gpt-neox` against GPT-NeoX's own loaders, sample by sample.

    python benchmarks/neox_order.py --upstream DIR --python PYTHON

DIR is a checkout of EleutherAI/gpt-neox whose `megatron/data/helpers.cpp` is compiled, PYTHON an interpreter that can
import it (see neox_compat.py). For ten setups (one split file or several, weights, documents, epochs, lengths, batches,
data-parallel ranks), both programs read the same files with numbered tokens, and every token of every micro-batch of
every rank is compared. The exit code is 1 if any differs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Keys of the run; `documents` per file; `length`: maximum of a document; `dp`: data-parallel ranks.
SHAPES: list[dict[str, Any]] = [
    {"documents": [60], "length": 40, "seq_length": 16, "train_iters": 12, "micro": 2, "steps": 1, "dp": 1},
    {"documents": [60], "length": 40, "seq_length": 16, "train_iters": 12, "micro": 2, "steps": 2, "dp": 2, "seed": 7},
    {"documents": [500], "length": 90, "seq_length": 32, "train_iters": 50, "micro": 4, "steps": 1, "dp": 2},
    {"documents": [20], "length": 30, "seq_length": 8, "train_iters": 60, "micro": 2, "steps": 2, "dp": 1},
    {"documents": [7], "length": 9, "seq_length": 33, "train_iters": 10, "micro": 1, "steps": 1, "dp": 3},
    {
        "documents": [300],
        "length": 50,
        "seq_length": 16,
        "train_iters": 20,
        "micro": 2,
        "steps": 1,
        "dp": 1,
        "list": True,
    },
    {
        **{"documents": [100, 40], "length": 50, "seq_length": 16, "train_iters": 30, "micro": 2, "steps": 2, "dp": 2},
        "weights": [0.9, 0.1],
    },
    {
        **{
            "documents": [80, 30, 300],
            "length": 20,
            "seq_length": 24,
            "train_iters": 40,
            "micro": 1,
            "steps": 3,
            "dp": 2,
        },
        **{"weights": [3.0, 1.0, 0.5], "seed": 99},
    },
    {
        **{
            "documents": [90, 20, 10],
            "length": 60,
            "seq_length": 16,
            "train_iters": 25,
            "micro": 2,
            "steps": 1,
            "dp": 1,
        },
        "alpha": 0.3,
    },
    {
        **{"documents": [40] * 12, "length": 30, "seq_length": 16, "train_iters": 40, "micro": 4, "steps": 1, "dp": 1},
        "weights": [0.1 * (1 + number) for number in range(12)],
    },
]


def make_files(folder: Path) -> None:
    """One pair of files for each source of each setup; token i of a file is i, so that samples reveal their origin."""
    import numpy as np

    from megatron.data.indexed import IndexedWriter

    for number, shape in enumerate(SHAPES):
        random = np.random.RandomState(number)
        for source, documents in enumerate(shape["documents"]):
            writer = IndexedWriter(folder / f"{number}_{source}", np.dtype(np.int32))
            first = 100_000 * source
            for size in random.randint(1, shape["length"], documents):
                writer.add(np.arange(first, first + size))
                first += size
            writer.finish()


def paths(folder: Path, number: int) -> list[str]:
    return [str(folder / f"{number}_{source}") for source in range(len(SHAPES[number]["documents"]))]


def is_list(shape: dict[str, Any]) -> bool:
    return len(shape["documents"]) > 1 or shape.get("list", False)


def ours(folder: Path, number: int) -> list[list[list[int]]]:
    """The s + 1 tokens of every sample, per rank and in reading order."""
    from examples.llama_keys import LLAMA
    from megatron.data.build import build_datasets
    from megatron.data.sampler import MicroBatches
    from megatron.neox_arguments import NeoXArgs

    shape = SHAPES[number]
    data: dict[str, Any] = {"data_path": paths(folder, number)[0], "split": "969,30,1"}
    if is_list(shape):
        data = {"train_data_paths": paths(folder, number), "train_data_weights": shape.get("weights")}
        if "alpha" in shape:
            data = {**data, "weight_by_num_documents": True, "weighted_sampler_alpha": shape["alpha"]}
    model = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 1 << 24}
    args = NeoXArgs.from_dict(
        {
            **LLAMA,
            **{"max_position_embeddings": 64, "distributed_backend": "gloo", "from_scratch": True},
            **model,
            **data,
            **{"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}, "data_order": "gpt-neox"},
            **{"seq_length": shape["seq_length"], "train_iters": shape["train_iters"], "seed": shape.get("seed", 1234)},
            **{"train_micro_batch_size_per_gpu": shape["micro"], "gradient_accumulation_steps": shape["steps"]},
        },
        world_size=shape["dp"],
    )
    dataset = build_datasets(args).train
    result = []
    for rank in range(shape["dp"]):
        batches = MicroBatches(dataset, shape["micro"], rank, shape["dp"], shape["steps"])
        read = itertools.islice(batches, shape["train_iters"] * shape["steps"])
        result.append(
            [
                [*row, int(labels[-1])]
                for b in read
                for row, labels in zip(b["tokens"].tolist(), b["labels"], strict=True)
            ]
        )
    return result


def theirs(folder: Path, number: int) -> list[list[list[int]]]:
    """The samples of `ours` from GPT-NeoX's `build_train_valid_test_data_loaders`, with a world of one process."""
    import torch

    from megatron import mpu
    from megatron.data import data_utils

    shape = SHAPES[number]
    torch.cuda.LongTensor = torch.LongTensor
    many = is_list(shape)
    files = paths(folder, number)
    args = SimpleNamespace(
        **{"train_iters": shape["train_iters"], "train_epochs": None, "eval_interval": 1000, "eval_iters": 1},
        **{"train_batch_size": shape["micro"] * shape["steps"] * shape["dp"], "batch_size": shape["micro"]},
        **{"seq_length": shape["seq_length"], "seed": shape.get("seed", 1234), "num_workers": 0, "iteration": 0},
        **{"data_path": None if many else files[0], "split": "969,30,1", "data_impl": "mmap", "pack_impl": "packed"},
        **{"allow_chopped": True, "dataset_impl": "gpt2", "mmap_warmup": False, "use_shared_fs": True},
        **{"weight_by_num_documents": "alpha" in shape, "weighted_sampler_alpha": shape.get("alpha", 1.0)},
        **{"is_pipe_parallel": False, "precompute_model_name": None, "gradient_accumulation_steps": shape["steps"]},
        **{f"{part}_data_paths": files if many else None for part in ("train", "valid", "test")},
        **{f"{part}_data_weights": shape.get("weights", [1.0] * len(files)) for part in ("train", "valid", "test")},
        **{f"{part}_label_data_paths": None for part in ("train", "valid", "test")},
        **{f"{part}_reward_data_paths": None for part in ("train", "valid", "test")},
        **{f"{s}_{p}_data_paths": None for s in ("pos", "neg") for p in ("train", "valid", "test")},
        **{f"{s}_{p}_label_data_paths": None for s in ("pos", "neg") for p in ("train", "valid", "test")},
    )
    result = []
    for rank in range(shape["dp"]):
        mpu.get_data_parallel_world_size = lambda: shape["dp"]
        mpu.get_data_parallel_rank = lambda rank=rank: rank
        mpu.get_model_parallel_rank = lambda: 0
        mpu.get_model_parallel_src_rank = lambda: 0
        mpu.get_model_parallel_group = mpu.get_io_parallel_group = lambda: None
        loader = data_utils.build_train_valid_test_data_loaders(args)["train"]
        read = itertools.islice(itertools.cycle(loader), shape["train_iters"] * shape["steps"])
        result.append([row for batch in read for row in batch["text"].tolist()])
    return result


def upstream_side(folder: Path) -> None:
    """Runs in GPT-NeoX's environment."""
    import torch

    out = os.dup(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    os.environ["LOCAL_RANK"] = "0"
    with contextlib.redirect_stdout(io.StringIO()):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # its C++ prints as well
        answer = [theirs(folder, number) for number in range(len(SHAPES))]
    os.write(out, b"")
    Path(folder, "theirs.json").write_text(json.dumps(answer))


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--upstream", type=Path, help="a checkout of GPT-NeoX")
    p.add_argument("--python", help="interpreter that can import it")
    p.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    options = p.parse_args()
    if options.side:
        upstream_side(options.side)
        return 0
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder)
        command = [options.python, str(Path(__file__).resolve()), "--side", name]
        env = {**os.environ, "PYTHONPATH": str(options.upstream.resolve())}
        subprocess.run(command, check=True, env=env, cwd=name)
        answers = json.loads((folder / "theirs.json").read_text())
        wrong = 0
        for number, (shape, their_ranks) in enumerate(zip(SHAPES, answers, strict=True)):
            our_ranks = ours(folder, number)
            total = sum(map(len, our_ranks))
            same = sum(a == b for x, y in zip(our_ranks, their_ranks, strict=True) for a, b in zip(x, y, strict=True))
            wrong += same != total
            print(f"shape {number}: {same} of {total} samples are the same, token by token | {shape}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
