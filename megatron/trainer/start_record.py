"""Records a run beside its metrics each time it starts: enough to describe it without its folders."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.checkpoint.provenance import commit, versions
from megatron.data.skip_ranges import SampleRanges
from megatron.model.flops import megatron_flops_per_token

if TYPE_CHECKING:
    from megatron.checkpoint.start import Start
    from megatron.checkpoint.state import TrainState
    from megatron.data.build import Datasets
    from megatron.neox_arguments import NeoXArgs

STARTS = "starts.jsonl"  # in log_dir


def start_record(
    args: NeoXArgs, start: Start, datasets: Datasets, state: TrainState, train_iters: int
) -> dict[str, Any]:
    """The record as plain JSON values; `data` are the samples of each source from here to the end of the run."""
    first = state.consumed_samples
    left = (train_iters - state.iteration) * args.train_batch_size
    end = SampleRanges(args.skip_sample_ranges).after(first, left)
    data = [] if datasets.blend is None else datasets.blend.shares(first, end)
    return {
        "time": time.time(),
        "iteration": state.iteration,
        "consumed_samples": first,
        "train_iters": train_iters,
        "from": None if start.checkpoint is None else str(start.checkpoint.folder),
        "restored": None if start.checkpoint is None else start.restored,
        "batch": args.train_batch_size,
        "seq_length": args.seq_length,
        "ranks": args.global_num_gpus,
        "layout": {
            "tp": args.model_parallel_size,
            "pp": args.pipe_parallel_size,
            "dp": args.data_parallel_size,
        },
        "flops_per_token": megatron_flops_per_token(args.whole_shape, args.seq_length),
        "precision": args.precision,
        "lr_overrides": [override.model_dump() for override in args.lr_overrides],
        "data": [{"source": source, "samples": samples, "passes": passes} for source, samples, passes in data],
        "commit": commit(),
        "versions": versions(),
        "config": args.merged,
    }


def write_start(log_dir: str | Path, record: dict[str, Any]) -> None:
    """Append a line to `log_dir/starts.jsonl`."""
    folder = Path(log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / STARTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
