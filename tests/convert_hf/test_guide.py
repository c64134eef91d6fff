"""Every command of docs/converting.md, in the guide's order, on a small model with the guide's names."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from megatron.layout import LlamaShape
from tests.support.converter_inputs import write_meta, write_neox_sequential
from tests.support.documentation import ROOT, documented_commands
from tests.support.hf_folders import Model, write_hf
from tests.support.training_checkpoints import write_training_checkpoint
from tools.convert_hf.cli import main
from tools.convert_hf.verify.diagnose import HYPOTHESES

pytestmark = pytest.mark.unit

GUIDE = "docs/converting.md"
TEXT = (ROOT / GUIDE).read_text()


def test_commands_of_the_guide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(heads=16, kv_heads=8, head_dim=8, intermediate=64, vocab=64)
    state = write_hf(tmp_path / "Llama-3.1-70B", model, shards=3)
    write_meta(tmp_path / "Llama-3.1-70B" / "original", model, state, 8, False, rope_theta=500000.0)
    write_neox_sequential(tmp_path / "gpt-neox-run", model, state, 2)
    shape = LlamaShape(model.layers, model.hidden, model.heads, model.kv_heads, model.intermediate, 64, 64, tied=False)
    monkeypatch.chdir(tmp_path)
    prefix = "python tools/convert_hf "
    ran = [c for c in documented_commands(GUIDE) if c.startswith(prefix)]
    assert len(ran) >= 12
    for command in ran:
        if "--input checkpoints" in command:  # what a training run would have left
            shutil.copytree("llama31-70b", "checkpoints")
        if "--optimizer" in command:
            write_training_checkpoint(tmp_path / "runs/astro", shape, 8, 1, 2)
        capsys.readouterr()
        code = main(command.removeprefix(prefix).split())
        printed = capsys.readouterr()
        assert code == 0, f"{command}\n{printed.err}"
        if " verify " in command:
            assert printed.out.endswith(("EQUAL\n", "every file matches its manifest\n"))
        if " inspect " in command:
            labels = [line[:16] for line in printed.out.splitlines()]
            assert labels == [line[:16] for line in TEXT.split("```")[3].strip().splitlines()]
    assert not list(tmp_path.glob("*.partial"))


def test_causes_of_the_guide_are_those_of_the_program() -> None:
    """The messages quoted in the table are exactly those of the program."""
    quoted = [q.replace("\\|", "|") for q in re.findall(r"`([^`\n]+)`", TEXT) if len(q) > 10]
    for hypothesis in HYPOTHESES:
        assert any(q in hypothesis.text for q in quoted), hypothesis.text
