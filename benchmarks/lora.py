"""LoRA compared with training all weights of the same model: optimizer memory and step time.

    python benchmarks/lora.py [--rank 16] [--recompute] [--device cpu|cuda] [--json FILE]

Both engines live in one process and alternate steps, so that other load slows both. Bytes are those of masters and
moments, counted in the engines. Weights and tokens are random: the results do not depend on what is learned.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks.small_llama import SmallLlama, random_samples, start_engine, train_step  # noqa: E402
from megatron.model.flops import megatron_flops_per_token  # noqa: E402

WARM_UP = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--recompute", action="store_true", help="recompute every layer, in both")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = measure(options)
    print(
        f"{report['parameters']:,} parameters, {report['trained']:,} in an adapter of rank {options.rank} "
        f"({report['trained'] / report['parameters']:.2%})\n"
        f"optimizer states: {report['bytes']['full']:,} bytes against {report['bytes']['lora']:,}: "
        f"{report['bytes_ratio']:.4f} of them\n"
        f"step, LoRA over all weights: median {report['time_ratio']:.2f}, {report['fastest']:.2f} to "
        f"{report['slowest']:.2f} in {options.steps} pairs; by FLOPs {report['flops_ratio']:.2f}"
    )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run both trainings with alternating steps."""
    from megatron.core import parallel_state

    model = SmallLlama(options.hidden, options.layers, options.vocab, options.seq)
    keys = {
        "train_micro_batch_size_per_gpu": options.batch,
        "checkpoint_activations": options.recompute,
        "distributed_backend": "gloo" if options.device == "cpu" else "nccl",
        "precision": "fp32" if options.device == "cpu" else "bfloat16",
    }
    adapter = {"lora": {"rank": options.rank, "alpha": options.rank}, "from_scratch": False, "load": "unused"}
    samples = random_samples(options.vocab, options.seq, options.batch)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        dist.init_process_group(keys["distributed_backend"], init_method=store, rank=0, world_size=1)
        runs = {}
        for name, extra in (("full", {}), ("lora", adapter)):
            if parallel_state.model_parallel_is_initialized():
                parallel_state.destroy_model_parallel()
            args = model.arguments(**keys | extra)
            runs[name] = start_engine(args, torch.device(options.device)), args
        # Alternate single steps of both.
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(WARM_UP + options.steps):
            for name, (engine, args) in runs.items():
                start = time.perf_counter()
                train_step(engine, args, samples)
                if number >= WARM_UP:
                    times[name].append(time.perf_counter() - start)
        sizes = {
            name: sum(tensor.nbytes for shard in engine.optimizer_shards() for tensor in shard.tensors.values())
            for name, (engine, _) in runs.items()
        }
        dist.destroy_process_group()
    ratios = [lora / full for full, lora in zip(times["full"], times["lora"], strict=True)]
    args = runs["lora"][1]
    flops = [megatron_flops_per_token(shape, options.seq) for shape in (args.shape, args.whole_shape)]
    return {
        "parameters": args.shape.num_parameters,
        "trained": args.trained_shape.num_parameters,
        "bytes": sizes,
        "bytes_ratio": sizes["lora"] / sizes["full"],
        "time_ratio": statistics.median(ratios),
        "fastest": min(ratios),
        "slowest": max(ratios),
        "flops_ratio": flops[1] / flops[0],
        "seconds": times,
    }


if __name__ == "__main__":
    sys.exit(main())
