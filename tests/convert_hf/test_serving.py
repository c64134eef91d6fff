"""`inspect --serving` reports whatever a server would miss in an exported folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.hf_folders import Model, write_hf
from tools.convert_hf.cli import main
from tools.convert_hf.commands.serving import serving_checks

pytestmark = pytest.mark.unit

TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}},
    "added_tokens": [
        {"content": "<|end_of_text|>", "id": 5, "special": True},
        {"content": "<|eot_id|>", "id": 7, "special": True},
    ],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete export of a chat model."""
    path = tmp_path / "hf"
    write_hf(path, Model())
    (path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return path


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def verdicts(folder: Path) -> dict[str, str]:
    return {check.what: check.verdict for check in serving_checks(folder)}


def test_a_complete_export_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), "--serving"]) == 0
    assert "[5, 7] in generation_config.json" in capsys.readouterr().out
    assert set(verdicts(folder).values()) == {"ok"}


CASES: list[tuple[str, str, Callable[[dict[str, Any]], Any], str, str]] = [
    ("config.json", "architecture", lambda c: c.update(architectures=["Other"]), "missing", "architectures ['Other']"),
    ("config.json", "shape", lambda c: c.pop("num_key_value_heads"), "missing", "lacks num_key_value_heads"),
    ("config.json", "rotary", lambda c: c.pop("rope_theta"), "missing", "servers assume 10000"),
    (
        "config.json",
        "rotary",
        lambda c: c.update(rope_parameters={**c.pop("rope_scaling"), "rope_theta": c.pop("rope_theta")}),
        "warning",
        "only rope_parameters (llama3)",
    ),
    ("config.json", "rotary", lambda c: c.update(rope_parameters={"rope_theta": 1.0}), "missing", "contradict"),
    ("config.json", "dtype", lambda c: c.pop("torch_dtype"), "warning", "fp32"),
    ("config.json", "tokenizer", lambda c: c.update(vocab_size=7), "missing", "token 7 has no row"),
    ("generation_config.json", "stop tokens", lambda c: c.update(eos_token_id=5), "missing", "<|eot_id|> (7)"),
]


@pytest.mark.parametrize(("file", "what", "change", "verdict", "text"), CASES)
def test_missing_items_are_reported(
    file: str, what: str, change: Callable[[dict[str, Any]], Any], verdict: str, text: str, folder: Path
) -> None:
    edit(folder / file, change)
    found = {check.what: check for check in serving_checks(folder)}
    assert found[what].verdict == verdict
    assert text in found[what].text
    assert all(check.verdict == "ok" for name, check in found.items() if name != what)


def test_a_base_model_needs_no_end_of_turn(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    edit(folder / "generation_config.json", lambda c: c.update(eos_token_id=5))
    assert verdicts(folder)["chat template"] == "warning"
    assert verdicts(folder)["stop tokens"] == "ok"
    assert main(["inspect", str(folder), "--serving"]) == 0


def test_missing_files_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "generation_config.json").unlink()
    assert main(["inspect", str(folder), "--serving", "--json"]) == 1
    found = {check["what"]: check["verdict"] for check in json.loads(capsys.readouterr().out)}
    assert found["tokenizer"] == "missing"
    assert found["stop tokens"] == "warning"
    (folder / "config.json").unlink()
    assert main(["inspect", str(folder), "--serving"]) == 2
    assert "config.json is missing" in capsys.readouterr().err
