"""benchmarks/neox_compat.py detects a Llama that is refused and a GPT that is accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import neox_compat
from tests.support.gpt_neox_files import LLAMA, MACHINE, TRAINING

pytestmark = pytest.mark.unit

GPT = {**LLAMA, "norm": "layernorm", "activation": "gelu"}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    files = {
        **{"llama/7B": LLAMA, "llama/train_config": TRAINING, "local_setup": MACHINE, "125M": GPT},
        **{"old": {**LLAMA, "gas": 2}, "paths": {"data_path": "a", "tensorboard_dir": "b"}},
    }
    for name, keys in files.items():
        path = tmp_path / "configs" / f"{name}.yml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(keys))
    return tmp_path


def test_the_table(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert neox_compat.main(["--upstream", str(checkout)]) == 0
    shown = capsys.readouterr().out
    assert "Dense Llama: 4 of 4 accepted untouched." in shown
    assert "1 of 1 told so first, in one round. Old words: 1, 1 answered in one round." in shown
    assert "GPT-NeoX parses 0 (not run: no --python)" in shown


@pytest.mark.parametrize("changes", [{"optimizer": {"type": "Lion", "params": {"lr": 1e-3}}}, {"z_loss": 0.1}])
def test_a_llama_that_is_refused_fails(checkout: Path, capsys: pytest.CaptureFixture[str], changes: Any) -> None:
    file = checkout / "configs/llama/train_config.yml"
    file.write_text(yaml.safe_dump({**TRAINING, **changes}))
    assert neox_compat.main(["--upstream", str(checkout), "--details"]) == 1
    assert f"    | {next(iter(changes))}" in capsys.readouterr().out


def test_a_gpt_that_is_accepted_fails(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: the kind of model is not checked."""
    from megatron.neox_arguments import review

    monkeypatch.setattr(review, "other_model", lambda keys: None)
    assert neox_compat.main(["--upstream", str(checkout)]) == 1
