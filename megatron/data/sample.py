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
    """A sample of text or of an image.

    For text, int64 tensors of length s. `labels[i]` is what position i must predict, -100 where nothing is learned.
    `positions` restart at 0 with every document and are there only if documents are isolated. `sample_id` is the
    sample's place in the order of the run, -1 for padding that completes a batch.

    For an image, `patches` and `targets` [s, values], uint8 or float32: `targets[i]` is the patch that position i must
    predict where `mask[i]` is True (bool [s]).
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    patches: Tensor
    targets: Tensor
    mask: Tensor
    sample_id: int


def stack(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """The tensors of several samples, [len(samples), ...]: of text or images, with positions if present."""
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
    """Samples by number, as a trainer reads them."""

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
        """Sample `index` in this source's reading order, with `sample_id` as its id."""

    def describe_left_out(self) -> list[str]:
        """Lines for the log on documents that are in no sample."""
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
        """Make a sample of up to s + 1 tokens, a label for each (None: the tokens), and the places of document starts.

        With isolated documents, the last position of each predicts nothing: the next token belongs to another document.
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
