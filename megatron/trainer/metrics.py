"""What a run reports: a console line, JSONL for scripts, TensorBoard and (on request) wandb for curves.

Only global rank 0 writes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.checkpoint.state import TrainState
from megatron.engine.protocol import Counters, StepResult
from megatron.model.flops import megatron_flops_per_token
from megatron.neox_arguments import NeoXArgs
from megatron.supervision.status_store import Whereabouts
from megatron.trainer.gpt_neox_log import interval_fields, interval_scalars

logger = logging.getLogger(__name__)

STARTED = "NEOX_STARTED"  # set by the launcher: time.time() when deepy.py started


class Metrics:
    """Console, `log_dir/metrics.jsonl`, TensorBoard and wandb, behind two methods."""

    def __init__(self, args: NeoXArgs, rank: int, train_iters: int) -> None:
        self.args, self.train_iters = args, train_iters
        self.active = rank == 0
        self._jsonl: Any = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._interval_start = time.perf_counter()
        self._interval_iterations = 0
        self._interval_losses: list[float] = []
        self._counted = Counters()
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
            self._wandb = self._open_wandb()

    def _open_wandb(self) -> Any:
        """The run in Weights & Biases; as in GPT-NeoX a run continues without it if the package or API key is
        missing."""
        try:
            import wandb
        except ImportError:
            logger.warning("use_wandb: the package wandb is not installed (pip install wandb); nothing is logged there")
            return None
        os.environ.setdefault("WANDB_BASE_URL", self.args.wandb_host)
        try:
            return wandb.init(
                project=self.args.wandb_project,
                group=self.args.wandb_group,
                name=self.args.wandb_run_name,
                entity=self.args.wandb_team,
                config=self.args.merged,
            )
        except wandb.errors.Error as error:
            logger.warning(f"use_wandb: {error}; nothing is logged there")
            return None

    def record(self, iteration: int, values: dict[str, float]) -> None:
        """Values under NeoX's names (`train/lm_loss`, `runtime/tokens_per_sec`, ...) to all sinks but the console."""
        if self._jsonl:
            self._jsonl.write(json.dumps({"iteration": iteration, "time": time.time(), **values}) + "\n")
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, iteration)
        if self._wandb:
            self._wandb.log(values, step=iteration)

    def record_timers(self, iteration: int, slowest: Mapping[str, tuple[float, int]]) -> None:
        """The slowest rank's seconds of each phase of a step."""
        if slowest:
            self.record(iteration, {f"timers/{phase}": seconds for phase, (seconds, _) in slowest.items()})

    def start_clock(self, counters: Counters | None = None) -> None:
        """Start timing: the first step begins now; `counters` are the engine's."""
        self._counted = counters or Counters()
        self._interval_start = time.perf_counter()

    @contextlib.contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """Exclude what happens inside (an evaluation, a save) from the step time."""
        start = time.perf_counter()
        yield
        self._interval_start += time.perf_counter() - start

    def step(
        self,
        state: TrainState,
        result: StepResult,
        learning_rate: float,
        learned_tokens: int,
        counters: Counters,
    ) -> None:
        """Record one optimizer step, after which the run is at `state`; print a line every `log_interval`."""
        if not self.active:
            return
        iteration = state.iteration
        self._interval_iterations += 1
        if result.applied:
            self._interval_losses.append(result.loss)
        values = {
            f"train/{self.args.loss_name}": result.loss,
            "train/learning_rate": learning_rate,
            "train/grad_norm": result.grad_norm,
            "train/learned_tokens": learned_tokens,
            "train/consumed_samples": state.consumed_samples,
            "train/skipped_steps": counters.not_finite,
        }
        if result.loss_scale is not None:
            values |= {"train/loss_scale": result.loss_scale, "train/overflow_steps": counters.overflows}
        # At the end of an interval: its mean step time, speed and the console line.
        if iteration % self.args.log_interval == 0 or iteration == self.train_iters:
            seconds = (time.perf_counter() - self._interval_start) / self._interval_iterations
            tokens_per_second = self.args.train_batch_size * self.args.seq_length / seconds
            ranks, unit = self.args.global_num_gpus, self.args.learned_unit
            flops = megatron_flops_per_token(self.args.whole_shape, self.args.seq_length)
            tflops = tokens_per_second * flops / ranks / 1e12
            values |= {
                "runtime/iteration_time": seconds,
                "runtime/tokens_per_sec": tokens_per_second,
                "runtime/tflops_per_rank_megatron": tflops,
                **interval_scalars(self.args, seconds),
            }
            fields = interval_fields(
                self.args,
                seconds,
                learning_rate,
                self._interval_losses,
                result.loss_scale,
                skipped=counters.skipped - self._counted.skipped,
                not_finite=counters.not_finite - self._counted.not_finite,
            )
            logger.info(
                f"iteration {iteration:>6}/{self.train_iters} | loss {result.loss:.4f} | lr {learning_rate:.3e} | "
                f"grad norm {result.grad_norm:.3f} | {seconds * 1e3:.0f} ms | {tokens_per_second:,.0f} {unit}/s "
                f"({tokens_per_second / ranks:,.0f} per rank) | {tflops:.4g} TFLOP/s per rank (Megatron formula) | "
                f"{fields} | ETA {_clock(seconds * (self.train_iters - iteration))} |"
            )
            self._interval_iterations, self._interval_losses, self._counted = 0, [], counters
            self._interval_start = time.perf_counter()
        # JSON has no NaN, and a curve cannot show one.
        self.record(iteration, {name: value for name, value in values.items() if math.isfinite(value)})

    def close(self) -> None:
        for sink in (self._jsonl, self._tensorboard):
            if sink:
                sink.close()
        if self._wandb:
            self._wandb.finish()


def _clock(seconds: float) -> str:
    """`1:02:03`, preceded by the days if there are any."""
    days, rest = divmod(round(seconds), 86400)
    return (f"{days} d " if days else "") + f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"


class StartUpClock:
    """Breakdown of the time from the command line to the first optimizer step, into contiguous spans."""

    def __init__(self, whereabouts: Whereabouts) -> None:
        self._whereabouts = whereabouts
        self._last = float(os.environ.get(STARTED, time.time()))
        self.spans: dict[str, float] = {}

    def done(self, what: str) -> None:
        """End the current span and name it `what`."""
        now = time.time()
        self.spans[what] = now - self._last
        self._last = now
        self._whereabouts.at(f"start-up, after {what}")

    def line(self) -> str:
        parts = ", ".join(f"{what} {seconds:.1f}" for what, seconds in self.spans.items())
        return f"{sum(self.spans.values()):.1f} s to the end of the first step: {parts}"
