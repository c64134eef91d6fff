"""`~` and `$VARIABLES` in paths."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron.neox_arguments import ConfigError, NeoXArgs
from megatron.neox_arguments.paths import PATH_KEYS, UnsetVariable, expand_path
from tests.support.configurations import keys

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$SCRATCH/y", "/scratch/y"),
        ("${SCRATCH}x", "/scratchx"),
        ("a$$b", "a$b"),
        ("plain/path", "plain/path"),
        ("~/x", str(Path.home() / "x")),
        ("a~b", "a~b"),
        ("cost 5$", "cost 5$"),
    ],
)
def test_paths_are_expanded(text: str, expected: str) -> None:
    assert expand_path(text, {"SCRATCH": "/scratch"}) == expected


def test_a_variable_that_is_not_set() -> None:
    with pytest.raises(UnsetVariable, match="NOWHERE"):
        expand_path("$NOWHERE/x", {})
    with pytest.raises(ConfigError, match=r"save: '\$NOWHERE_AT_ALL/x' contains the variable NOWHERE_AT_ALL"):
        NeoXArgs.from_dict(keys(save="$NOWHERE_AT_ALL/x", checkpoint_factor=1))
    NeoXArgs.from_dict(keys(save="$$NOWHERE_AT_ALL/x", checkpoint_factor=1))  # as the message says


def test_every_kind_of_path_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch")
    sources = ["$SCRATCH/a", {"path": "~/b", "replay": {"share": 0.2}}]
    args = NeoXArgs.from_dict(keys(log_dir="$SCRATCH/log", vocab_file="~/t.json", train_data_paths=sources))
    assert (args.log_dir, args.vocab_file) == ("/scratch/log", str(Path.home() / "t.json"))
    assert args.train_data_paths is not None
    first, second = args.train_data_paths
    assert first == "/scratch/a"
    assert not isinstance(second, str)
    assert second.path == str(Path.home() / "b")
    assert args.replace(seed=3).log_dir == "/scratch/log"


def test_the_nodes_expand_what_is_left_to_them(tmp_path: Path) -> None:
    (tmp_path / "run.yml").write_text("{}")
    given = keys(log_dir="$NODES_ONLY/log")
    args = NeoXArgs.from_ymls([tmp_path / "run.yml"], given, paths_on_nodes=True)
    assert args.log_dir == "$NODES_ONLY/log"


def test_no_path_is_forgotten() -> None:
    """Every key described as a path, a file, a folder or a prefix."""
    sounds = re.compile(r"\b(folder|path|prefix(es)?|label files|file\.)\b|^where generated|^prompts", re.IGNORECASE)
    # These mention paths of other keys.
    exceptions = {"data_impl", "data_order", "profile", "iteration", "split", "chat", "text_gen_type", "show_thinking"}
    for name, field in NeoXArgs.model_fields.items():
        if sounds.search(field.description or "") and name not in exceptions:
            assert name in PATH_KEYS or "_data_weights" in name, name
    assert set(PATH_KEYS) <= set(NeoXArgs.model_fields)
