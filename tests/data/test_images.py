"""Images as samples: the order of patches, which patches are learned, and the order of images in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.data.build import build_datasets
from megatron.data.image_sources import ImageSource
from megatron.data.images import open_images
from megatron.data.indexed import DataError, IndexedFile
from megatron.data.patch_form import PatchForm, cut_patches, join_patches, patch_order, spiral
from megatron.data.sampler import MicroBatches
from megatron.neox_arguments import NeoXArgs
from tests.support.configurations import IMAGES, keys
from tests.support.made_images import blobs, import_archive

pytestmark = pytest.mark.unit

FORM = PatchForm(4, "spiral", 8, (9.0,), "float32")


@given(st.integers(1, 9), st.integers(1, 9))
def test_a_spiral_is_a_permutation_from_the_center(rows: int, columns: int) -> None:
    order = spiral(rows, columns)
    assert sorted(order.tolist()) == list(range(rows * columns))
    rings = np.maximum(np.abs(order // columns - (rows - 1) / 2), np.abs(order % columns - (columns - 1) / 2))
    assert rings[0] == rings.min()
    if rows == columns:
        assert (np.diff(rings) > -0.6).all(), "no ring is left before it is full"


def test_the_first_steps_are_right_down_left_left_up() -> None:
    assert spiral(3, 3).tolist() == [4, 5, 8, 7, 6, 3, 0, 1, 2]
    assert spiral(2, 2).tolist() == [0, 1, 3, 2]
    assert patch_order("raster", 2, 3).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("order", ["spiral", "raster"])
def test_patches_are_cut_and_joined(order: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 8, 3), dtype=np.uint8)
    cut = cut_patches(image, 4, order)
    assert cut.shape == (6, 48)
    first = int(patch_order(order, 3, 2)[0])
    top, left = 4 * (first // 2), 4 * (first % 2)
    assert np.array_equal(cut[0], image[top : top + 4, left : left + 4].reshape(-1))
    assert np.array_equal(join_patches(cut, 12, 8, 4, order), image)


def test_blank_patches_are_read_and_not_learned() -> None:
    image = np.random.default_rng(0).normal(size=(12, 12, 1)).astype(np.float32)
    order = spiral(3, 3).tolist()
    flat, holed = order.index(8), order.index(3)  # positions of two patches in the sequence
    image[8:, 8:] = 3.0
    image[5, 1] = np.nan
    sample = FORM.make(image, 5)
    assert sample["patches"].shape == sample["targets"].shape == (8, 16)
    assert (~sample["mask"]).nonzero().flatten().tolist() == sorted([flat - 1, holed - 1])
    assert (sample["patches"][[flat, holed]] == 9.0).all(), "filled with what is 0 when it is normalized"
    assert torch.isfinite(sample["patches"]).all()
    assert torch.isfinite(sample["targets"]).all()
    assert torch.equal(sample["patches"][1:], sample["targets"][:-1])
    assert sample["sample_id"] == 5


def test_all_patches_may_be_read_and_the_last_predicts_nothing() -> None:
    image = blobs(1, 12, 1)[0]
    short, whole = (PatchForm(4, "raster", s, (0.0,), "uint8").make(image, 0) for s in (8, 9))
    assert torch.equal(whole["patches"][:8], short["patches"])
    assert torch.equal(whole["targets"][:8], short["targets"])
    assert whole["mask"].tolist() == [*short["mask"].tolist(), False]


def test_a_blank_image_and_padding_teach_nothing() -> None:
    assert not FORM.make(np.full((12, 12, 1), 7.0, np.float32), 0)["mask"].any()
    padding = FORM.padding()
    assert padding["sample_id"] == -1
    assert not padding["mask"].any()
    assert padding["patches"].shape == (8, 16)


def arguments(prefix: str, **changes: Any) -> NeoXArgs:
    return NeoXArgs.from_dict(keys(**IMAGES | {"train_data_paths": [prefix], "seq_length": 3} | changes))


def test_every_epoch_reads_each_image_once(tmp_path: Path) -> None:
    prefix = import_archive(tmp_path, "a", blobs(10, 16))
    form = PatchForm(8, "spiral", 3, (0.0,) * 3, "uint8")
    long, short = (ImageSource(prefix, form, 1234, samples) for samples in (30, 15))
    numbers = [long.image_number(index) for index in range(30)]
    assert all(sorted(numbers[start : start + 10]) == list(range(10)) for start in (0, 10, 20))
    assert numbers[:10] != numbers[10:20]
    assert [short.image_number(index) for index in range(15)] == numbers[:15], "a longer run begins like a shorter one"
    once = ImageSource(prefix, form, 1234, None, (2, 7))
    assert sorted(once.image_number(index) for index in range(len(once))) == [2, 3, 4, 5, 6]


def test_the_data_of_the_run_are_split_and_batched(tmp_path: Path) -> None:
    prefix = import_archive(tmp_path, "a", blobs(20, 16))
    args = arguments(prefix, train_data_paths=None, data_path=prefix, split="8,1,1", train_iters=3)
    datasets = build_datasets(args)
    batches = [MicroBatches(datasets.train, 2, rank, 2, 2) for rank in range(2)]
    first = [next(iter(batch)) for batch in batches]
    assert first[0]["patches"].shape == (2, 3, 192)
    assert first[0]["patches"].dtype == torch.uint8
    assert [batch["sample_id"].tolist() for batch in first] == [[0, 1], [2, 3]]
    assert [len(dataset) for dataset in datasets.valid.values()] == [2]


def test_images_and_text_are_not_mistaken_for_each_other(tmp_path: Path) -> None:
    from tests.support.made_data import numbered, write

    text, images = write(tmp_path / "text", numbered([30] * 4)), import_archive(tmp_path, "a", blobs(4, 16))
    with pytest.raises(DataError, match="only it says what shape the images have"):
        build_datasets(arguments(text))
    with pytest.raises(DataError, match="holds images, not text"):
        build_datasets(NeoXArgs.from_dict(keys(train_data_paths=[images])))
    floats = import_archive(tmp_path, "f", blobs(4, 16).astype(np.float32))
    Path(f"{floats}.json").unlink()
    with pytest.raises(DataError, match="float32 values, which are not tokens"):
        build_datasets(NeoXArgs.from_dict(keys(train_data_paths=[floats])))
    with pytest.raises(DataError, match=r"have 3 bands \(r, g, b\), patches\.channels is 1"):
        build_datasets(arguments(images, patches={"size": 8, "channels": 1, "normalise": "patch"}))
    with pytest.raises(DataError, match="cannot be cut into patches of 7 x 7"):
        build_datasets(arguments(images, patches={"size": 7, "normalise": "patch"}))


def test_a_header_of_other_data_is_found(tmp_path: Path) -> None:
    one, other = (import_archive(tmp_path, name, blobs(count, 16)) for name, count in (("a", 4), ("b", 5)))
    Path(f"{one}.json").write_bytes(Path(f"{other}.json").read_bytes())
    with pytest.raises(DataError, match="the header belongs to other data"):
        open_images(one)


def test_megatron_core_reads_the_pair(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    for name, values in (("bytes", blobs(3, 8)), ("floats", blobs(3, 8).astype(np.float32))):
        prefix = import_archive(tmp_path, name, values)
        theirs, ours = IndexedDataset(prefix), IndexedFile(prefix)
        assert theirs[2].dtype == ours.dtype == values.dtype
        assert np.array_equal(theirs[2], values[2].reshape(-1))
