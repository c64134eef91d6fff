"""Checkpoint against configuration: differences in the model stop a run, other differences are listed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.facts import (
    MODEL_KEYS,
    check_model,
    data_changes,
    describe_run_changes,
    facts_of,
    recorded_facts,
)
from megatron.common.errors import CheckpointError
from megatron.neox_arguments import NeoXArgs
from tests.support.configurations import IMAGES, ROPE, VALID, keys

pytestmark = pytest.mark.unit

FOLDER = Path("runs/astro/global_step20")
OTHER_MODEL: dict[str, Any] = {
    "num_layers": 6,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 360,
    "vocab_size": 4100,
    "no_weight_tying": False,
    "rms_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "rope_scaling": {**ROPE, "factor": 32.0},
}


def config_json(args: NeoXArgs, new_spelling: bool) -> bytes:
    """config.json as written by `transformers` 4 and 5; its numbers come from `VALID`, not from the code under test."""
    rope = {key: ROPE[key] for key in ROPE}
    both = {"rope_parameters": {**rope, "rope_theta": 500000.0}}
    old = {"rope_theta": 500000.0, "rope_scaling": rope}
    return json.dumps(
        {
            "num_hidden_layers": VALID["num_layers"],
            "hidden_size": VALID["hidden_size"],
            "num_attention_heads": VALID["num_attention_heads"],
            "num_key_value_heads": VALID["num_kv_heads"],
            "intermediate_size": VALID["intermediate_size"],
            "vocab_size": VALID["vocab_size"],
            "tie_word_embeddings": False,
            "rms_norm_eps": VALID["rms_norm_epsilon"],
            **(both if new_spelling else old),
        }
    ).encode()


@pytest.mark.parametrize("source", ["manifest", "config.json", "config.json of transformers 5"])
def test_each_fact_of_the_model_stops_and_is_named(source: str) -> None:
    right = NeoXArgs.from_dict(keys())
    if source == "manifest":
        model, _ = recorded_facts({"facts": json.loads(json.dumps(facts_of(right)))}, None)
    else:
        model, _ = recorded_facts({"written_by": "tools/convert_hf"}, config_json(right, "5" in source))
    assert model.keys() == set(MODEL_KEYS)
    check_model(FOLDER, model, right)
    assert OTHER_MODEL.keys() == set(MODEL_KEYS)
    for name, value in OTHER_MODEL.items():
        with pytest.raises(CheckpointError, match=rf"a different model .*\n  {name}: .* in the checkpoint"):
            check_model(FOLDER, model, NeoXArgs.from_dict(keys(**{name: value}), task="model"))


def test_a_model_without_scaling_and_one_with_it_differ() -> None:
    raw = json.loads(config_json(NeoXArgs.from_dict(keys()), new_spelling=False)) | {"rope_scaling": None}
    model, _ = recorded_facts({}, json.dumps(raw).encode())
    with pytest.raises(CheckpointError, match="rope_scaling: null in the checkpoint"):
        check_model(FOLDER, model, NeoXArgs.from_dict(keys()))
    check_model(FOLDER, model, NeoXArgs.from_dict(keys(rope_scaling=None)))


def test_all_differences_are_named_at_once_and_the_advice_works() -> None:
    model = facts_of(NeoXArgs.from_dict(keys()))["model"]
    changes = {"rotary_emb_base": 10000, "rms_norm_epsilon": 1e-6}
    with pytest.raises(CheckpointError) as caught:
        check_model(FOLDER, model, NeoXArgs.from_dict(keys(**changes)))
    assert "rms_norm_epsilon: 1e-05 in the checkpoint, 1e-06 in the configuration" in str(caught.value)
    advised = str(caught.value).partition("--allow_model_changes [")[2].partition("]")[0].split(", ")
    check_model(FOLDER, model, NeoXArgs.from_dict(keys(**changes, allow_model_changes=advised)))
    with pytest.raises(CheckpointError, match="rotary_emb_base"):
        check_model(FOLDER, model, NeoXArgs.from_dict(keys(**changes, allow_model_changes=["rms_norm_epsilon"])))


def test_a_changed_run_is_listed_in_one_block(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text("{}")
    (tmp_path / "two.json").write_text("[]")
    before = NeoXArgs.from_dict(keys(vocab_file=str(tmp_path / "one.json")))
    _, run = recorded_facts({"facts": json.loads(json.dumps(facts_of(before)))}, None)
    assert describe_run_changes(run, before) is None
    optimizer = {"type": "Adam", "params": {"lr": 2e-3, "betas": [0.9, 0.95], "eps": 1e-8}}
    changes = {"seq_length": 128, "optimizer": optimizer, "gradient_accumulation_steps": 8, "seed": 2}
    now = NeoXArgs.from_dict(keys(**changes, vocab_file=str(tmp_path / "two.json"), train_data_paths=["other"]))
    text = describe_run_changes(run, now)
    assert text is not None
    changed = {line.split()[0] for line in text.splitlines()[1:]}
    assert changed == {"seq_length", "optimizer.params.lr", "train_batch_size", "seed", "train_data_paths", "tokenizer"}
    assert re.search(r"^  seed +1234 -> 2$", text, re.MULTILINE)


def test_a_checkpoint_of_an_earlier_version_knows_the_keys_it_was_given() -> None:
    provenance = {"written_by": "training", "config": keys(train_iters=20)}
    model, run = recorded_facts(provenance, None)
    check_model(FOLDER, model, NeoXArgs.from_dict(keys()))
    with pytest.raises(CheckpointError, match="rms_norm_epsilon"):
        check_model(FOLDER, model, NeoXArgs.from_dict(keys(rms_norm_epsilon=1e-6)))
    text = describe_run_changes(run, NeoXArgs.from_dict(keys()))
    assert text is not None
    assert "train_iters  20 -> 10" in text


@pytest.mark.parametrize(
    ("saved", "now", "said"),
    [
        ({}, {"a": {"hash": "1"}}, []),
        ({"a": "1"}, {"a": "1"}, []),
        ({"a": "1"}, {"a": "2"}, ["differs", "a"]),
        ({"a": {"hash": "1", "content": "x", "written": 1}}, {"a": {"hash": "1", "content": "y", "written": 1}}, ["a"]),
        ({"a": {"hash": "1"}}, {"a": {"hash": "1", "content": "y", "written": 2}}, ["rewritten"]),
        ({"a": {"hash": "1", "content": "y", "written": 1}}, {"a": {"hash": "1", "content": "y", "written": 2}},
         ["rewritten"]),
        ({"a": {"hash": "1"}}, {"b": {"hash": "1"}}, []),
        ({"a": {"hash": "1"}}, {"b": {"hash": "2"}}, ["differs", "a, b"]),
    ],
)  # fmt: skip
def test_data_that_is_not_what_was_read(saved: dict, now: dict, said: list[str]) -> None:
    text = "\n".join(data_changes(saved, now))
    assert all(word in text for word in said)
    assert bool(text) is bool(said)


def test_images_and_text_are_other_models() -> None:
    """In both directions, by manifest and by an export's config.json; another patch size is another model, too."""
    text, images = NeoXArgs.from_dict(keys()), NeoXArgs.from_dict(keys(**IMAGES))
    recorded = facts_of(images)["model"]
    assert not {"vocab_size", "no_weight_tying"} & recorded.keys()
    check_model(FOLDER, recorded, images)
    with pytest.raises(CheckpointError, match='modality: "patches" in the checkpoint, "text" in the configuration'):
        check_model(FOLDER, recorded, text)
    with pytest.raises(CheckpointError, match='modality: "text" in the checkpoint, "patches" in the configuration'):
        check_model(FOLDER, facts_of(text)["model"], images)
    raster = NeoXArgs.from_dict(keys(**IMAGES | {"patches": {**IMAGES["patches"], "order": "raster"}}))
    exported, _ = recorded_facts({}, json.dumps({"patches": recorded["patches"], "vocab_size": 1}).encode())
    for known in (recorded, exported):
        with pytest.raises(CheckpointError, match=r'patches: \{.*"order": "spiral".* in the checkpoint'):
            check_model(FOLDER, known, raster)
