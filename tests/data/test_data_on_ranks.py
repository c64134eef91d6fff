"""Datasets on several ranks: the same data everywhere; an error on one rank is raised on all."""

from pathlib import Path

import numpy as np
import pytest

from megatron.data.build import build_datasets
from megatron.data.indexed import DataError, IndexedWriter
from megatron.data.sampler import MicroBatches
from tests.support.configurations import data_args
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


def _write(prefix: Path) -> str:
    writer = IndexedWriter(prefix, np.dtype(np.uint16))
    for i in range(40):
        writer.add(np.arange(30) + 30 * i)
    writer.finish()
    return str(prefix)


def _read(rank: int, world_size: int, prefix: str) -> list[int]:
    train = build_datasets(data_args(data_path=prefix)).train
    return [i for batch in MicroBatches(train, 2, rank, world_size, 1) for i in batch["sample_id"].tolist()]


def _one_cannot_see_the_data(rank: int, world_size: int, prefix: str) -> str:
    with pytest.raises(DataError) as caught:
        build_datasets(data_args(data_path=prefix if rank != 1 else prefix + "x"))
    return str(caught.value)


def _one_cannot_read_the_tokenizer(rank: int, world_size: int, prefix: str, vocab_file: str) -> str:
    with pytest.raises(DataError) as caught:
        build_datasets(data_args(data_path=prefix, vocab_file=vocab_file if rank == 2 else None))
    return str(caught.value)


def test_ranks_build_together_and_share_the_samples(tmp_path: Path) -> None:
    read = run_ranks(_read, 4, _write(tmp_path / "d"))
    assert sorted(i for rank in read for i in rank) == list(range(160))


def test_what_fails_on_one_rank_is_raised_by_all(tmp_path: Path) -> None:
    prefix = _write(tmp_path / "d")
    messages = run_ranks(_one_cannot_see_the_data, 3, prefix)
    assert len(set(messages)) == 1
    assert messages[0].startswith(f"opening the data failed. rank 1: {prefix}x.idx: no such file")


def test_a_tokenizer_that_one_rank_cannot_read_is_a_user_error_on_all(tmp_path: Path) -> None:
    messages = run_ranks(_one_cannot_read_the_tokenizer, 3, _write(tmp_path / "d"), str(tmp_path / "absent.json"))
    assert len(set(messages)) == 1
    assert "rank 2: vocab_file" in messages[0]
