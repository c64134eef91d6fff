"""Several sources as one: shares, replay, and the order of the run."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.data.blend import assign_sources, mix, shares
from megatron.data.build import build_datasets
from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.keys.data import Replay
from tests.support.configurations import data_args
from tests.support.made_data import S, numbered, write

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("weights", [[1], [0.8, 0.2], [1, 0, 3], [1000] + [1] * 999, [3] * 40 + [0.001] * 7])
def test_every_stretch_of_a_blend_holds_the_shares(weights: list[float]) -> None:
    share = shares(weights)
    source_of, within = assign_sources(share, 20_000)
    for n in (1, 10, 333, 5000, 20_000):
        counts = np.bincount(source_of[:n], minlength=len(weights))
        assert np.abs(counts - share * n).max() < 3
    for source in range(len(weights)):
        assert within[source_of == source].tolist() == list(range((source_of == source).sum()))
    shorter = assign_sources(share, 777)
    assert shorter[0].tolist() == source_of[:777].tolist()


def test_realised_shares_are_within_a_tenth_of_a_percent() -> None:
    share = shares([0.55, 0.25, 0.1999, 0.0001])
    source_of, _ = assign_sources(share, 1_000_000)
    assert np.abs(np.bincount(source_of, minlength=4) / 1_000_000 - share).max() < 1e-5


def replayed(path: str, share: float, fresh: bool = True) -> dict[str, Any]:
    """An entry of train_data_paths with replay."""
    return {"path": path, "replay": {"share": share, "fresh_each_epoch": fresh}}


def general_tokens(args: NeoXArgs, epoch: float) -> list[list[int]]:
    """Tokens of the replayed source (ids from 100,000), by epoch of the corpus."""
    train = build_datasets(args).train
    found: list[list[int]] = [[] for _ in range(int(len(train) / epoch) + 1)]
    for i in range(len(train)):
        tokens = train[i]["tokens"].tolist()
        if tokens[0] >= 100_000:
            found[int(i / epoch)] += tokens
    return found


@pytest.mark.parametrize("packing", ["packed", "pack_until_overflow"])
@pytest.mark.parametrize("fresh", [True, False])
def test_replay(tmp_path: Path, fresh: bool, packing: str) -> None:
    domain = [write(tmp_path / f"d{i}", numbered([S] * n, first=10_000 * i)) for i, n in enumerate((150, 50))]
    general = write(tmp_path / "g", numbered([S] * 175, first=100_000))
    paths = [*domain, replayed(general, 0.2, fresh)]
    args = data_args(train_data_paths=paths, train_iters=100, pack_impl=packing)
    epoch = 200 / 0.8
    by_epoch = general_tokens(args, epoch)
    assert [len(tokens) // S for tokens in by_epoch] == [50, 50, 50, 10]
    if fresh:
        read = [t for tokens in by_epoch for t in tokens]
        assert len(set(read)) == len(read)  # nothing is repeated: 160 of 175 samples were used
    else:
        assert sorted(by_epoch[0]) == sorted(by_epoch[1]) == sorted(by_epoch[2])
    datasets = build_datasets(args)
    assert "20.00% of the run" in datasets.notes[-1]
    assert "by epoch of the corpus 20.00%, 20.00%, 20.00%, 20.00%" in datasets.notes[-1]
    seen = [datasets.train[i]["tokens"].tolist() for i in range(250)]
    in_domain = [t for tokens in seen for t in tokens if t < 100_000]
    assert len(in_domain) == 200 * S
    assert len(set(in_domain)) >= 0.97 * 200 * S  # the corpus is read once, except where its two sources meet


def test_exhausted_replay_begins_again_in_another_order(tmp_path: Path) -> None:
    domain = write(tmp_path / "d", numbered([S] * 100))
    general = write(tmp_path / "g", numbered([S] * 20, first=100_000))
    args = data_args(train_data_paths=[domain, replayed(general, 0.2)], train_iters=25)
    read = [t for tokens in general_tokens(args, 125) for t in tokens]
    assert len(read) == 40 * S
    assert sorted(read[: 20 * S]) == sorted(read[20 * S :]) == list(range(100_000, 100_000 + 20 * S))
    assert read[: 20 * S] != read[20 * S :]


def test_realised_replay_over_a_million_samples() -> None:
    replay = Replay(share=0.2)
    mixture = mix([90_000.3, 30_000.9, 1e9], None, [None, None, replay], 1_000_000)
    assert mixture.epoch is not None
    edges = np.arange(0, 1_000_000, mixture.epoch).astype(int)
    for first, end in itertools.pairwise(edges):
        part = mixture.source_of[first:end]
        assert abs((part == 2).mean() - 0.2) < 0.001
        assert abs((part == 0).mean() - 0.8 * 0.75) < 0.001
