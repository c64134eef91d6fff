"""A sample: up to s + 1 tokens as inputs and the tokens they must predict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from megatron.common.labels import IGNORE_INDEX


class Sample(TypedDict, total=False):
    """Of text, int64 tensors of length s. `labels[i]` is what position i must predict, -100 where nothing is learned.
    `positions` restart at 0 with every document and are there only if documents are isolated. `sample_id` is the
    sample's place in the order of the run, -1 for padding that completes a batch.

    Of an image, `patches` and `targets` [s, values], uint8 or float32: `targets[i]` is the patch that position i must
    predict where `mask[i]` is True (bool [s])."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    patches: Tensor
    targets: Tensor
    mask: Tensor
    sample_id: int


def stack(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """The tensors of several samples, [len(samples), ...]: of text or of images, and positions where there are any."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in _TENSORS if key in samples[0]}


_TENSORS: tuple[Literal["tokens", "labels", "positions", "patches", "targets", "mask"], ...] = (
    "tokens",
    "labels",
    "positions",
    "patches",
    "targets",
    "mask",
)


class SampleDataset(Dataset[Sample], ABC):
    """What a trainer reads."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    @abstractmethod
    def padding(self) -> Sample:
        """A sample that teaches nothing."""


class SampleSource(SampleDataset):
    """Samples of one data prefix. `samples_per_epoch` is how many read all of it once."""

    prefix: str
    samples_per_epoch: float

    @abstractmethod
    def read(self, index: int, sample_id: int) -> Sample:
        """Sample `index` in this source's reading order, under the name `sample_id`."""

    def describe_left_out(self) -> list[str]:
        """Lines for the log: what of the documents is in no sample."""
        return []


@dataclass(frozen=True)
class SampleForm:
    """How tokens become a sample, the same for all sources of a run."""

    seq_length: int
    isolate_documents: bool = False
    masked_input: int | None = None  # positions whose input is this id predict nothing (`eod_mask_loss`)
    pad: int = 0

    def make(
        self, tokens: NDArray[np.int64], labels: NDArray[np.int64] | None, starts: list[int], sample_id: int
    ) -> Sample:
        """From up to s + 1 tokens, their labels by token (None: the tokens) and where documents begin in them.

        With isolated documents the last position of each has nothing to predict: the next token is another's.
        """
        s, n = self.seq_length, len(tokens)
        inputs = np.full(s, self.pad, np.int64)
        targets = np.full(s, IGNORE_INDEX, np.int64)
        length = min(n, s)
        inputs[:length] = tokens[:length]
        targets[: n - 1] = tokens[1:] if labels is None else labels[1:]
        targets[targets < 0] = IGNORE_INDEX
        if self.masked_input is not None:
            targets[inputs == self.masked_input] = IGNORE_INDEX
        sample = Sample(tokens=torch.from_numpy(inputs), labels=torch.from_numpy(targets), sample_id=sample_id)
        if self.isolate_documents:
            positions = np.arange(s, dtype=np.int64)
            for start in [*(b for b in starts if 0 < b < s), *([n] if n < s else [])]:
                positions[start:] = np.arange(s - start)
            targets[[b - 1 for b in starts if 0 < b <= s]] = IGNORE_INDEX
            sample["positions"] = torch.from_numpy(positions)
        return sample

    def padding(self) -> Sample:
        return self.make(np.full(1, self.pad, np.int64), None, [0], -1)
