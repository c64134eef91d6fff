"""Keys for images: values derived from the data's header, the shape of the model, and requirements of the programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.layout import PatchShape
from megatron.neox_arguments import ConfigError, NeoXArgs
from tests.support.configurations import IMAGES, keys

pytestmark = pytest.mark.unit


def header(folder: Path, content: dict[str, Any]) -> str:
    (folder / "galaxies.json").write_text(json.dumps(content))
    return str(folder / "galaxies")


def test_the_scale_is_that_of_the_training_data_and_is_named(tmp_path: Path) -> None:
    prefix = header(tmp_path, {"images": {"mean": [10, 20.5, 30], "std": [1, 2, 3]}})
    given = keys(**IMAGES | {"patches": {"size": 8}, "train_data_paths": [prefix]})
    args = NeoXArgs.from_dict(given)
    assert args.patches is not None
    assert (args.patches.mean, args.patches.std) == ([10.0, 20.5, 30.0], [1.0, 2.0, 3.0])
    note = (
        f"patches.mean [10, 20.5, 30] and patches.std [1, 2, 3]: taken from the training data's header, {prefix}.json"
    )
    assert note in args.notes
    assert NeoXArgs.from_json(args.to_json()).patches == args.patches
    written = {"size": 8, "mean": [5.0], "std": [6.0]}
    args = NeoXArgs.from_dict(given | {"patches": written})
    assert args.patches is not None
    assert args.patches.mean == [5.0], "what is written counts"


def test_a_header_of_text_has_no_scale(tmp_path: Path) -> None:
    prefix = header(tmp_path, {"tokenizer": {}})
    with pytest.raises(ConfigError, match=r"galaxies\.json is not a header of images"):
        NeoXArgs.from_dict(keys(**IMAGES | {"patches": {"size": 8}, "train_data_paths": [prefix]}))


@pytest.mark.parametrize(("positions", "rows"), [("none", 0), ("learned", 1024)])
def test_the_shape_has_ends_for_patches(positions: str, rows: int) -> None:
    patches = {"size": 8, "channels": 2, "normalise": "patch", "tokenizer": "affine", "positions": positions}
    shape = NeoXArgs.from_dict(keys(**IMAGES | {"patches": patches})).shape
    assert isinstance(shape, PatchShape)
    assert (shape.patch_values, shape.num_positions, shape.tied) == (128, rows, False)
    layer = 128 * (128 + 2 * 64) + 128 * 128 + 3 * 128 * 352 + 2 * 128
    assert shape.num_parameters == 4 * layer + 128 + 2 * 128 * 128 + rows * 128


def test_the_last_patch_may_be_read_for_slices_of_the_sequence() -> None:
    odd = IMAGES | {"model_parallel_size": 2, "sequence_parallel": True, "seq_length": 63}
    with pytest.raises(ConfigError, match="write seq_length: 64"):
        NeoXArgs.from_dict(keys(**odd))
    NeoXArgs.from_dict(keys(**odd | {"seq_length": 64}))


def test_generation_needs_images_to_continue() -> None:
    load = {"from_scratch": None, "load": "runs/a"}
    with pytest.raises(ConfigError, match=r"completion\.path is missing"):
        NeoXArgs.from_dict(keys(**IMAGES | load), task="generate")
    args = NeoXArgs.from_dict(keys(**IMAGES | load | {"completion": {"path": "data/galaxies"}}), task="generate")
    assert args.completion.count == 8
    with pytest.raises(ConfigError, match="only for text"):
        NeoXArgs.from_dict(keys(**IMAGES | load | {"completion": {"path": "a"}, "chat": True}), task="generate")


def test_questions_are_refused() -> None:
    given = IMAGES | {"from_scratch": None, "load": "runs/a", "mcq": {"items": "q.jsonl"}}
    with pytest.raises(ConfigError, match=r"mcq\.py asks questions in text"):
        NeoXArgs.from_dict(keys(**given), task="mcq")
