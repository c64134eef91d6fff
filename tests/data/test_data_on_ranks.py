"""Datasets on several ranks: the same data everywhere, and one rank's trouble told by all."""

from pathlib import Path

import numpy as np
import pytest

from megatron.data import MicroBatches, build_datasets
from megatron.data.indexed import IndexedWriter
from tests.support.made_data import Args
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


def _write(prefix: Path) -> str:
    writer = IndexedWriter(prefix, np.dtype(np.uint16))
    for i in range(40):
        writer.add(np.arange(30) + 30 * i)
    writer.finish()
    return str(prefix)


def _read(rank: int, world_size: int, prefix: str) -> list[int]:
    train = build_datasets(Args(data_path=prefix, vocab_size=None)).train
    return [i for batch in MicroBatches(train, 2, rank, world_size, 1) for i in batch["sample_id"].tolist()]


def _one_cannot_see_the_data(rank: int, world_size: int, prefix: str) -> str:
    try:
        build_datasets(Args(data_path=prefix if rank != 1 else prefix + "x", vocab_size=None))
    except ValueError as error:
        return str(error)
    return "no error"


def test_ranks_build_together_and_share_the_samples(tmp_path: Path) -> None:
    read = run_ranks(_read, 4, _write(tmp_path / "d"))
    assert sorted(i for rank in read for i in rank) == list(range(160))


def test_one_ranks_trouble_is_told_by_all(tmp_path: Path) -> None:
    prefix = _write(tmp_path / "d")
    messages = run_ranks(_one_cannot_see_the_data, 3, prefix)
    assert all(f"{prefix}x.idx: no such file" in message for message in messages)
    assert "on rank 1" in messages[0]
