"""GPT-NeoX's order of samples equals that of its own loaders, recorded by `benchmarks/neox_order.py`."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import pytest

from benchmarks.neox_order import SHAPES, make_files, ours
from megatron.data.blend import Blend
from megatron.data.build import build_datasets, split_documents
from megatron.data.gpt_neox_order import weights_by_documents
from megatron.data.indexed import open_indexed
from tests.support.configurations import data_args

pytestmark = pytest.mark.unit

# For each shape: SHA-256 (16 digits) of all tokens of all samples of all ranks, and the last rank's first tokens.
RECORDED = [
    ("db211da7d5df03c7", 852),
    ("8b6381d6c924766a", 180),
    ("d30e7a217ad1324e", 9433),
    ("e65d77ef2a287f3a", 193),
    ("97b3c1498e230c0a", 10),
    ("469684605f1b7fba", 2956),
    ("b853d96684c72776", 798),
    ("7577ac2c61bba2a3", 100102),
    ("9abbe7f73ce4a0a7", 100738),
    ("5be88807e6da4a2b", 1100210),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("order")
    make_files(folder)
    return folder


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_the_samples_are_those_of_gpt_neox_in_its_order(files: Path, number: int) -> None:
    samples = ours(files, number)
    digest = hashlib.sha256(json.dumps(samples).encode()).hexdigest()[:16]
    assert (samples[-1][0][0], digest) == (RECORDED[number][1], RECORDED[number][0])


def test_another_seed_or_length_is_another_order(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-NeoX shuffles all epochs at once, so the order depends on the run's length."""
    before = ours(files, 3)
    for changes in ({"seed": 4321}, {"train_iters": SHAPES[3]["train_iters"] + 20}):
        monkeypatch.setitem(SHAPES[3], *next(iter(changes.items())))
        assert ours(files, 3)[0][:10] != before[0][:10]


def test_a_run_that_continues_reads_on(files: Path) -> None:
    """The order does not depend on the position at which a run starts."""
    args = data_args(train_data_paths=[str(files / "2_0")], data_order="gpt-neox")
    whole, later = (build_datasets(args, **at).train for at in ({}, {"iteration": 5, "consumed_samples": 40}))
    assert [later[i]["tokens"].tolist() for i in (40, 159)] == [whole[i]["tokens"].tolist() for i in (40, 159)]


@pytest.mark.parametrize(
    ("split", "documents", "borders"),
    [
        ("969,30,1", 500, [0, 485, 500, 500]),
        ("969,30,1", 1000, [0, 969, 999, 1000]),
        ("949,50,1", 37, [0, 35, 37, 37]),
        ("995,4,1", 11, [0, 11, 11, 11]),
        ("50,50", 3, [0, 1, 3, 3]),
        ("1,1,1", 2, [0, 0, 1, 2]),
    ],
)
def test_split_has_the_borders_of_gpt_neox(split: str, documents: int, borders: list[int]) -> None:
    """Expected values are from its `get_train_valid_test_split_`."""
    assert split_documents(split, documents) == list(itertools.pairwise(borders))


def test_weights_by_documents_are_gpt_neox_s(files: Path) -> None:
    """Expected values are from its `weights_by_num_docs`, in which the source with most documents counts less."""
    assert weights_by_documents([90, 20, 10], 0.3) == [0.19922187742000957, 0.42291395861167347, 0.37786416396831696]
    assert weights_by_documents([5, 5, 1000], 1.0) == [0.25062344139650866, 0.25062344139650866, 0.4987531172069828]
    assert weights_by_documents([7], 0.3) == [1.0]
    paths = [str(files / f"8_{source}") for source in range(3)]
    assert [len(open_indexed(path)) for path in paths] == [90, 20, 10]
    blend = build_datasets(
        data_args(
            train_data_paths=paths,
            weight_by_num_documents=True,
            weighted_sampler_alpha=0.3,
            train_data_weights=[9, 1, 1],
        )
    ).train
    assert isinstance(blend, Blend)
    counts = [int((blend.mixture.source_of == source).sum()) for source in range(3)]
    assert counts == pytest.approx([160 * share for share in (0.199, 0.423, 0.378)], abs=2)
