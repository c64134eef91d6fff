"""Rules of the keys of embed.py: each rejects its case, which passes without the rule."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megatron.neox_arguments import ConfigError, NeoXArgs
from megatron.neox_arguments.keys import embeddings
from megatron.neox_arguments.keys.all_keys import REGISTRY
from megatron.neox_arguments.keys.embeddings import chosen_layers
from tests.support.configurations import keys

pytestmark = pytest.mark.unit

BASE = {"from_scratch": None, "load": "runs/a", "vocab_file": "tokenizer.json"}
ASKED = {"input": "a.jsonl"}
IMAGES: dict[str, Any] = {
    **dict.fromkeys(("vocab_file", "vocab_size", "make_vocab_size_divisible_by", "no_weight_tying")),
    "modality": "patches",
    "patches": {"size": 4, "normalise": "patch"},
}
BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("embedded_with_some_weights", {"embed": ASKED, "load": None}, "embed.py needs load, the folder of a checkpoint"),
    ("texts_to_embed_are_given", {}, "embed.input is missing"),
    ("texts_to_embed_have_a_tokenizer", {"embed": ASKED, "vocab_file": None}, "embed.py reads texts: give vocab_file"),
    ("images_are_read_whole", {**IMAGES, "embed": {**ASKED, "text_field": "x"}}, "embed.text_field applies to texts"),
    ("vectors_have_a_format", {"embed": {**ASKED, "output": "a.txt"}}, "ends in .npy or .parquet"),
    ("embedded_layers_exist", {"embed": {**ASKED, "layers": [0, 99]}}, "embed.layers [99]: expected numbers from 0"),
    ("embedded_layers_exist", {"embed": {**ASKED, "layers": []}}, "embed.layers []: expected numbers from 0"),
]


@pytest.mark.parametrize(("rule", "changes", "message"), BROKEN)
def test_a_broken_rule_is_reported(
    rule: str, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        NeoXArgs.from_dict(keys(**BASE | changes), task="embed")
    assert "things are wrong" not in str(caught.value)
    monkeypatch.setattr(REGISTRY, "rules", [entry for entry in REGISTRY.rules if entry.name != rule])
    NeoXArgs.from_dict(keys(**BASE | changes), task="embed")


def test_every_rule_has_a_case() -> None:
    assert {entry.name for entry in embeddings.registry.rules} == {rule for rule, *_ in BROKEN}


@pytest.mark.parametrize(
    ("given", "chosen"),
    [("all", (0, 1, 2, 3, 4)), (-1, (4,)), (0, (0,)), ([-1, 2, 4], (2, 4)), ([-5], (0,))],
)
def test_layers_are_counted_as_hidden_states_are(given: Any, chosen: tuple[int, ...]) -> None:
    changes = {"num_layers": 4, "optimizer": None, "train_iters": None, "train_data_paths": None, "seq_length": None}
    args = NeoXArgs.from_dict(keys(**BASE | changes | {"embed": {**ASKED, "layers": given}}), task="embed")
    assert chosen_layers(args) == chosen
    assert args.seq_length == args.max_position_embeddings
    assert NeoXArgs.from_json(args.to_json()) == args
