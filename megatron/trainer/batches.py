"""The batches of training, starting from a position in the order of samples."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from megatron.data.sample import SampleDataset
from megatron.data.sampler import MicroBatches
from megatron.data.skip_ranges import SampleRanges
from megatron.engine.batches import MicroBatch, StepBatch, assemble_step
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.place import Place
from megatron.supervision.step_timers import StepTimers

logger = logging.getLogger(__name__)


class TrainingBatches:
    """Global batches in the run's order; ranks of stages that read no data only take part in counting tokens."""

    def __init__(self, args: NeoXArgs, place: Place, dataset: SampleDataset, consumed_samples: int) -> None:
        self.args, self.place = args, place
        self.consumed_samples = consumed_samples
        self._skip = SampleRanges(args.skip_sample_ranges)
        self._micro_batches: Iterator[MicroBatch] | None = None
        if place.reads_data:
            self._micro_batches = iter(
                MicroBatches(
                    dataset,
                    micro_batch=args.train_micro_batch_size_per_gpu,
                    dp_rank=place.dp_rank,
                    dp_size=place.dp,
                    accumulation=args.gradient_accumulation_steps,
                    consumed_samples=consumed_samples,
                    skip=self._skip,
                )
            )

    def announce_skipped_ranges(self) -> None:
        """At the start: which `skip_sample_ranges` are still ahead, and which no longer have an effect."""
        position = self.consumed_samples
        for first, end in self._skip.ranges:
            if end <= position:
                logger.info(f"skip_sample_ranges: [{first}, {end}) ends before position {position} and has no effect")
            else:
                logger.info(
                    f"skip_sample_ranges: [{max(first, position)}, {end}) is ahead, its samples will be skipped"
                )

    def next(self, iteration: int, timers: StepTimers) -> StepBatch:
        """The batch of step `iteration`. Collective."""
        accumulation, source = self.args.gradient_accumulation_steps, self._micro_batches
        with timers.during("data"):
            micro_batches = None if source is None else [next(source) for _ in range(accumulation)]
        return assemble_step(micro_batches, accumulation, self.place, f"training step {iteration}")

    def advance(self) -> tuple[int, int]:
        """The samples [first, end) of the step just finished, including skipped ones; the position moves past them."""
        first = self.consumed_samples
        self.consumed_samples = self._skip.after(first, self.args.train_batch_size)
        for start, end in self._skip.between(first, self.consumed_samples):
            logger.info(f"skip_sample_ranges: {end - start} samples skipped, [{start}, {end})")
        return first, self.consumed_samples
