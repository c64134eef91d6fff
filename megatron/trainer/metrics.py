"""What a run says while it runs: a line for people, JSONL for scripts, TensorBoard and (if asked) wandb for curves.

Only global rank 0 writes; on every other rank all of this is silent.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.checkpoint import TrainState
from megatron.model.flops import megatron_flops_per_token
from megatron.neox_arguments import NeoXArgs


class Progress:
    """Console, `log_dir/metrics.jsonl`, TensorBoard and wandb, behind two methods."""

    def __init__(self, args: NeoXArgs, rank: int) -> None:
        self.args = args
        self.active = rank == 0
        self._jsonl: Any = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._interval_start = time.perf_counter()
        self._interval_iterations = 0
        if self.active:
            self._open_sinks()

    def _open_sinks(self) -> None:
        if self.args.log_dir:
            folder = Path(self.args.log_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self._jsonl = (folder / "metrics.jsonl").open("a", buffering=1)
        if self.args.tensorboard_dir:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(self.args.tensorboard_dir)
        if self.args.use_wandb:
            import wandb

            self._wandb = wandb.init(
                project=self.args.wandb_project,
                group=self.args.wandb_group,
                name=self.args.wandb_run_name,
                entity=self.args.wandb_team,
                config=self.args.merged,
            )

    def say(self, text: str) -> None:
        if self.active:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        if self.active:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def record(self, iteration: int, values: dict[str, float]) -> None:
        """Values under NeoX's names (`train/lm_loss`, `runtime/tokens_per_sec`, ...) to all sinks but the console."""
        if self._jsonl:
            self._jsonl.write(json.dumps({"iteration": iteration, "time": time.time(), **values}) + "\n")
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, iteration)
        if self._wandb:
            self._wandb.log(values, step=iteration)

    def start_clock(self) -> None:
        """The first step begins now."""
        self._interval_start = time.perf_counter()

    @contextlib.contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """Leave what happens inside (an evaluation, a save) out of the step time."""
        start = time.perf_counter()
        yield
        self._interval_start += time.perf_counter() - start

    def step(
        self,
        state: TrainState,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        learned_tokens: int,
        skipped_steps: int,
    ) -> None:
        """Record one optimizer step, after which the run is at `state`; print a line every `log_interval`."""
        if not self.active:
            return
        iteration = state.iteration
        self._interval_iterations += 1
        values = {
            "train/lm_loss": loss,
            "train/learning_rate": learning_rate,
            "train/grad_norm": grad_norm,
            "train/learned_tokens": learned_tokens,
            "train/consumed_samples": state.consumed_samples,
            "train/skipped_steps": skipped_steps,
        }
        if iteration % self.args.log_interval == 0 or iteration == self.args.train_iters:
            seconds = (time.perf_counter() - self._interval_start) / self._interval_iterations
            tokens_per_second = self.args.train_batch_size * self.args.seq_length / seconds
            ranks = self.args.global_num_gpus
            tflops = tokens_per_second * megatron_flops_per_token(self.args.shape, self.args.seq_length) / ranks / 1e12
            values |= {
                "runtime/iteration_time": seconds,
                "runtime/tokens_per_sec": tokens_per_second,
                "runtime/tflops_per_rank_megatron": tflops,
            }
            self.say(
                f"iteration {iteration:>6}/{self.args.train_iters} | loss {loss:.4f} | lr {learning_rate:.3e} | "
                f"grad norm {grad_norm:.3f} | {seconds * 1e3:.0f} ms | {tokens_per_second:,.0f} tokens/s "
                f"({tokens_per_second / ranks:,.0f} per rank) | {tflops:.4g} TFLOP/s per rank (Megatron formula)"
            )
            self._interval_iterations = 0
            self._interval_start = time.perf_counter()
        # JSON has no NaN, and a curve no place for one.
        self.record(iteration, {name: value for name, value in values.items() if math.isfinite(value)})

    def close(self) -> None:
        for sink in (self._jsonl, self._tensorboard):
            if sink:
                sink.close()
        if self._wandb:
            self._wandb.finish()
