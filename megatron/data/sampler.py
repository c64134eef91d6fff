"""Micro-batches of one data-parallel rank, in an order that depends on the run and not on its layout.

Position is counted in samples of the whole run. Global batch g holds samples g*B to (g+1)*B; micro-step m of rank r
takes `micro_batch` of them from m * micro_batch * dp + r * micro_batch on, as in GPT-NeoX. So the same global batch is
the same set of samples for any micro-batch and data-parallel size, and any position can be reached directly. Samples
that are left out (`skip`) are treated as absent from the order, but positions count them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron.data.sample import Sample, SampleDataset, stack
from megatron.data.skip_ranges import SampleRanges

Batch = dict[str, Tensor]  # tokens, labels and perhaps positions [micro_batch, s]; sample_id [micro_batch]


class MicroBatches:
    """Iterator over a rank's micro-batches, `accumulation` of them per global batch.

    If the dataset does not fill the last global batch, samples without learned tokens complete it (`sample_id` -1).
    """

    def __init__(
        self,
        dataset: SampleDataset,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        accumulation: int,
        consumed_samples: int = 0,
        skip: SampleRanges | None = None,
    ) -> None:
        if not 0 <= dp_rank < dp_size or micro_batch < 1 or accumulation < 1 or consumed_samples < 0:
            raise ValueError(
                f"micro_batch {micro_batch}, rank {dp_rank} of {dp_size}, accumulation {accumulation}, "
                f"consumed_samples {consumed_samples} do not fit together"
            )
        self.dataset, self.micro_batch, self.accumulation = dataset, micro_batch, accumulation
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.first_sample = consumed_samples
        self.skip = skip or SampleRanges()
        self._given = 0  # micro-batches

    @property
    def global_batch(self) -> int:
        """Samples in a global batch."""
        return self.micro_batch * self.dp_size * self.accumulation

    @property
    def consumed_samples(self) -> int:
        """Position after the last complete global batch that was handed out: what a checkpoint stores."""
        return self.skip.after(self.first_sample, self._given // self.accumulation * self.global_batch)

    def __len__(self) -> int:
        """Micro-batches from the first position to the end of the data."""
        left = self.skip.kept(self.first_sample, len(self.dataset))
        return -(-left // self.global_batch) * self.accumulation

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._given >= len(self):
            raise StopIteration
        batch = self._read(self._given)
        self._given += 1
        return batch

    def sample_places(self, step: int) -> list[int]:
        """Places in the dataset that make up micro-batch `step`, counted from the first position."""
        start = (step * self.dp_size + self.dp_rank) * self.micro_batch
        return [self.skip.place(self.first_sample, count) for count in range(start, start + self.micro_batch)]

    def _read(self, step: int) -> Batch:
        samples: list[Sample] = [
            self.dataset[place] if place < len(self.dataset) else self.dataset.padding()
            for place in self.sample_places(step)
        ]
        batch = stack(samples)
        batch["sample_id"] = torch.tensor([sample["sample_id"] for sample in samples])
        return batch
