"""Micro-batches have the same order in every layout, can be sought, and the last batch is padded."""

from pathlib import Path

import pytest
import torch

from megatron.common.labels import IGNORE_INDEX
from megatron.data.build import build_datasets
from megatron.data.sampler import MicroBatches
from tests.support.made_data import blend_args

pytestmark = pytest.mark.unit


def ids(batches: MicroBatches) -> list[list[int]]:
    return [batch["sample_id"].tolist() for batch in batches]


def test_the_order_does_not_depend_on_the_layout(tmp_path: Path) -> None:
    train = build_datasets(blend_args(tmp_path)).train

    def order(micro: int, dp: int, accumulation: int, consumed: int = 0) -> list[int]:
        ranks = [ids(MicroBatches(train, micro, r, dp, accumulation, consumed)) for r in range(dp)]
        return [i for step in zip(*ranks, strict=True) for part in step for i in part]

    assert order(8, 1, 1) == list(range(160))
    for layout in ((1, 1, 8), (4, 2, 1), (2, 2, 2), (1, 8, 1), (1, 2, 4)):
        assert order(*layout) == list(range(160))
        assert order(*layout, consumed=56) == list(range(56, 160))


def test_batches(tmp_path: Path) -> None:
    train = build_datasets(blend_args(tmp_path, isolate_documents=True)).train
    batches = MicroBatches(train, 2, 1, 2, 2, consumed_samples=32)
    assert len(batches) == 32
    first = next(batches)
    assert first["sample_id"].tolist() == [34, 35]
    assert {key: tuple(value.shape) for key, value in first.items()} == {
        "tokens": (2, 16),
        "labels": (2, 16),
        "positions": (2, 16),
        "sample_id": (2,),
    }
    assert first["tokens"][1].tolist() == train[35]["tokens"].tolist()
    assert batches.consumed_samples == 32  # half a global batch has not been consumed
    next(batches)
    assert batches.consumed_samples == 40


def test_a_last_batch_is_completed_with_samples_that_teach_nothing(tmp_path: Path) -> None:
    valid = build_datasets(blend_args(tmp_path)).valid["v"]
    batches = [*MicroBatches(valid, 2, 0, 2, 2), *MicroBatches(valid, 2, 1, 2, 2)]
    seen = torch.cat([batch["sample_id"] for batch in batches])
    assert sorted(seen.tolist()) == [-1] * 6 + list(range(10))
    for batch in batches:
        assert (batch["labels"][batch["sample_id"] == -1] == IGNORE_INDEX).all()
    with pytest.raises(ValueError, match="do not fit together"):
        MicroBatches(valid, 1, 2, 2, 1)


def test_seeking_reads_nothing_before(prefix: str) -> None:
    class Counting:
        reads = 0

        def __len__(self) -> int:
            return 10**12

        def __getitem__(self, index: int) -> dict:
            Counting.reads += 1
            return {"tokens": torch.zeros(1), "labels": torch.zeros(1), "sample_id": index}

        def padding(self) -> dict:
            raise AssertionError

    assert next(MicroBatches(Counting(), 4, 3, 8, 2, 10**11))["sample_id"].tolist() == [
        10**11 + 12 + i for i in range(4)
    ]
    assert Counting.reads == 4
