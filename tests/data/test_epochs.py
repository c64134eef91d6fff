"""`train_epochs`: the length of a run in passes over its data."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron.data.build import build_datasets
from tests.support.configurations import data_args
from tests.support.made_data import write

pytestmark = pytest.mark.unit


def source(folder: Path, name: str, documents: int) -> str:
    """Documents of 17 tokens that equal the document's number; `unpacked` makes one sample of each."""
    return write(folder / name, [np.full(17, number) for number in range(documents)])


@pytest.mark.parametrize(("epochs", "iterations"), [(1.0, 10), (2.5, 25), (0.6, 6), (0.01, 1)])
def test_epochs_are_iterations_of_the_data(tmp_path: Path, epochs: float, iterations: int) -> None:
    args = data_args(
        train_data_paths=[source(tmp_path, "d", 80)], train_iters=None, train_epochs=epochs, pack_impl="unpacked"
    )
    datasets = build_datasets(args)
    assert datasets.train_iters == iterations
    assert len(datasets.train) == iterations * args.train_batch_size
    assert f"{iterations} iterations of 8" in "\n".join(datasets.notes)


def test_one_epoch_reads_every_document_of_every_source_once(tmp_path: Path) -> None:
    paths = [source(tmp_path, "a", 56), source(tmp_path, "b", 24)]
    length = {"train_iters": None, "train_epochs": 1.0}
    args = data_args(train_data_paths=paths, train_data_weights=[0.7, 0.3], pack_impl="unpacked", **length)
    train = build_datasets(args).train
    read = Counter(int(train[place]["tokens"][0]) for place in range(len(train)))
    assert read == Counter([*range(56), *range(24)])


def test_replayed_text_makes_an_epoch_longer_not_shorter(tmp_path: Path) -> None:
    """80 documents of the domain with a fifth of replay are 100 samples, 80 of them from the domain."""
    replay = {"path": source(tmp_path, "general", 300), "replay": {"share": 0.2}}
    paths = [source(tmp_path, "domain", 80), replay]
    length = {"train_iters": None, "train_epochs": 2.0, "train_batch_size": 4}
    datasets = build_datasets(data_args(train_data_paths=paths, pack_impl="unpacked", **length))
    assert datasets.train_iters == 50
    from_domain = sum(int(datasets.train.mixture.source_of[place]) == 0 for place in range(200))
    assert from_domain == 160
