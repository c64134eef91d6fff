"""Reading, merging and overriding: numbers are parsed as numbers, and duplicate or ignored keys are errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron.neox_arguments import ConfigError, NeoXArgs
from megatron.neox_arguments.load import merge_files, parse_overrides, parse_value, read_yaml
from megatron.neox_arguments.unsupported import UNSUPPORTED, WITHOUT_EFFECT
from tests.support.configurations import ROPE, VALID, keys

pytestmark = pytest.mark.unit


def write(folder: Path, **files: str) -> list[Path]:
    paths = []
    for name, text in files.items():
        path = folder / f"{name}.yml"
        path.write_text(text)
        paths.append(path)
    return paths


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1.0e5", 1e5),
        ("1.0e-5", 1e-5),
        ("6.0E+4", 6e4),
        ("-3", -3),
        ("0x10", 16),
        (".5", 0.5),
        ("12:30", "12:30"),
        ("010", "010"),
        ("2026-01-01", "2026-01-01"),
        ("969, 30, 1", "969, 30, 1"),
        ("1e", "1e"),
        ("True", True),
        ("[1, 2]", [1, 2]),
        ("{type: Adam, params: {lr: 3e-4}}", {"type": "Adam", "params": {"lr": 3e-4}}),
    ],
)
def test_values_are_what_they_look_like(text: str, value: object) -> None:
    read = parse_value(text)
    assert read == value
    assert type(read) is type(value)


def test_files_are_merged(tmp_path: Path) -> None:
    paths = write(tmp_path, a="num-layers: 4\n", b="{'hidden_size': 128, 'use_wandb': False,}\n")
    merged, places = merge_files(paths)
    assert merged == {"num_layers": 4, "hidden_size": 128, "use_wandb": False}
    assert places["num_layers"] == f"{tmp_path}/a.yml:1"


def test_yml_is_appended(tmp_path: Path) -> None:
    write(tmp_path, a="num_layers: 4\n")
    assert merge_files([tmp_path / "a"])[0] == {"num_layers": 4}


@pytest.mark.parametrize("second", ["num_layers: 5", "num-layers: 5"])
@pytest.mark.parametrize("first", ["num_layers: 4", "num-layers: 4"])
def test_a_key_in_two_files_names_both(tmp_path: Path, first: str, second: str) -> None:
    with pytest.raises(ConfigError, match=r"num_layers is given twice: .*a\.yml:1 and .*b\.yml:2"):
        merge_files(write(tmp_path, a=first, b="# a comment\n" + second))


@pytest.mark.parametrize("text", ["x: 1\ny: 2\nx: 3\n", "optimizer: {type: Adam, type: Lion}\n", "x-y: 1\nx_y: 2\n"])
def test_a_key_twice_in_one_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"a\.yml.* is given twice|is given twice: .*a\.yml:1 and .*a\.yml:2"):
        read_yaml(write(tmp_path, a=text)[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n- 2", "expected `key: value` lines"),
        ("a: !!python/name:os.system", "not valid"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_yaml(write(tmp_path, a=text)[0])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yml: cannot be read"):
        merge_files([tmp_path / "nothing"])


def test_overrides() -> None:
    given = [
        "--train-iters",
        "7",
        "--optimizer.params.lr=1e-5",
        "--from_scratch",
        "--min_lr",
        "-1",
        "--save",
        "runs/a-b",
    ]
    assert parse_overrides(given) == {
        "train_iters": 7,
        "optimizer.params.lr": 1e-5,
        "from_scratch": True,
        "min_lr": -1,
        "save": "runs/a-b",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--a", "1", "--a", "2"], "--a is given twice on the command line"),
        (["model.yml"], "model.yml: expected `--key value` here"),
        (["--a", "[1"], r"--a \[1: not a valid value"),
    ],
)
def test_wrong_overrides_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_overrides(words)


def test_overrides_win_and_reach_into_mappings(tmp_path: Path) -> None:
    path = write(tmp_path, a=yaml.safe_dump(VALID))[0]
    args = NeoXArgs.from_ymls([path], {"train_iters": 3, "optimizer.params.lr": 2e-3})
    assert (args.train_iters, args.lr, args.optimizer.params.betas) == (3, 2e-3, [0.9, 0.95])
    assert VALID["optimizer"]["params"]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 128}, "unknown key hiden_size; did you mean hidden_size?"),
        ({"rope_theta": 1.0, "xyzzy": 1}, "unknown key xyzzy; docs/configuration.md lists all keys"),
        ({"rope_scaling": {**ROPE, "fator": 8.0}}, r"unknown key rope_scaling\.fator; did you mean factor\?"),
        ({"train_data_paths": [{"path": "a", "reply": {"share": 0.2}}]}, r"reply; did you mean replay\?"),
        ({"mcq": {"thinking": True}}, r"unknown key mcq\.thinking; thinking is a top-level key, not part of mcq"),
        ({"lr_overrides": [{"at": 3, "factor": 1.0}]}, r"unknown key lr_overrides\.0\.factor; .* has at, scale"),
        ({"bf16": {"enabled": True, "kind": "bfloat16"}}, r"unknown key bf16\.kind; bf16 has check_grad_overflow, en"),
        ({"rope_scaling": {**ROPE, "rope_type": "yarn"}}, "given 'yarn', but it should be 'llama3'"),
        ({"train_iters": "10"}, "train_iters: given '10', but it should be a valid integer"),
        ({"train_iters": True}, "train_iters: given True"),
        ({"train_iters": None, "train_epochs": 0.0}, r"train_epochs: given 0\.0"),
        ({"max_position_embeddings": None}, "max_position_embeddings is missing"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1e-3, "weight_decay": 0.1}}}, "weight_decay is a top-level k"),
        ({"optimizer": {"type": "Lion", "params": {"lr": 1e-3}}}, "optimizer.type: given 'Lion'"),
        ({"data_types": {"grad_accum_dtype": "int8"}}, "grad_accum_dtype: given 'int8'"),
    ],
)  # fmt: skip
def test_wrong_keys_and_values_are_explained(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NeoXArgs.from_dict({**VALID, **changes})


def test_the_place_of_a_mistake_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, a=yaml.safe_dump(keys()) + "hiden_size: 3\n")[0]
    with pytest.raises(ConfigError, match=rf"a\.yml:{len(path.read_text().splitlines())}: unknown key hiden_size"):
        NeoXArgs.from_ymls([path])


def test_both_spellings_at_once_are_refused() -> None:
    with pytest.raises(ConfigError, match="with - and with _"):
        NeoXArgs.from_dict({**VALID, "num-layers": 4})


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_unsupported_keys_say_why_and_take_their_neutral_values(name: str) -> None:
    refusal = UNSUPPORTED[name]
    assert refusal.reason.endswith(".")
    for value in refusal.neutral:
        NeoXArgs.from_dict({**VALID, name: value})
    said_of_the_model = r"(not a dense Llama but|reinforcement training).*" + f"{name}: something"
    with pytest.raises(ConfigError, match=f"{name}: 'something' is not supported|{said_of_the_model}"):
        NeoXArgs.from_dict({**VALID, name: "something"})


def test_neutral_values_are_compared_by_type_too() -> None:
    """`context_parallel_size: true` is not the neutral 1."""
    with pytest.raises(ConfigError, match="context_parallel_size"):
        NeoXArgs.from_dict({**VALID, "context_parallel_size": True})
    with pytest.raises(ConfigError, match=r"hidden_dropout: 0\.1 is not supported\. Llama has no dropout"):
        NeoXArgs.from_dict({**VALID, "hidden_dropout": 0.1})


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_keys_without_effect_are_noted(name: str) -> None:
    args = NeoXArgs.from_dict({**VALID, name: True})
    assert any(f"{name} ({WITHOUT_EFFECT[name]})" in note for note in args.notes)
    assert NeoXArgs.from_dict({**VALID, name: {"enabled": False, "level": 2}}).notes == NeoXArgs.from_dict(VALID).notes


def test_no_key_is_in_two_tables() -> None:
    known = set(NeoXArgs.model_fields)
    assert not known & set(UNSUPPORTED)
    assert not known & set(WITHOUT_EFFECT)
    assert not set(UNSUPPORTED) & set(WITHOUT_EFFECT)
