"""Every command of docs/lora.md, in the order of the guide, on a small model under the guide's names."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.neox_arguments.load import read_yaml
from tests.support.documentation import ROOT, code_blocks, documented_commands
from tests.support.hf_folders import Model, write_hf
from tests.support.token_files import random_documents

pytestmark = pytest.mark.distributed

GUIDE = "docs/lora.md"
MODEL = Model(heads=4, kv_heads=2, head_dim=8, vocab=96)
SHORT: dict[str, Any] = {
    **{"seq_length": 16, "vocab_file": None, "tokenizer_type": None, "train_iters": 2, "checkpoint_factor": 2},
    **{"num_gpus": 1, "distributed_backend": "gloo", "precision": "fp32", "train_batch_size": 2, "eval_iters": 1},
    **{"allow_high_initial_loss": True, "log_dir": None},
}


def test_the_guide_shows_the_values_of_the_configuration() -> None:
    (shown,) = (yaml.safe_load(text) for text in code_blocks(GUIDE, "yaml"))
    written = read_yaml(ROOT / "configs/llama31_8b/lora.yml")[0]
    assert shown == {name: written[name] for name in shown}


def run(words: list[str], folder: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_commands_of_the_guide(tmp_path: Path) -> None:
    write_hf(tmp_path / "Llama-3.1-8B", MODEL)
    for name in ("domain_text_document", "domain_valid_text_document", "general_valid_text_document"):
        (tmp_path / "data").mkdir(exist_ok=True)
        random_documents(tmp_path / "data" / name, MODEL.vocab)
    for name in ("tools", "megatron", "launch", "configs/llama31_70b"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    small = tmp_path / "configs/llama31_8b"
    small.mkdir()
    written = read_yaml(ROOT / "configs/llama31_8b/lora.yml")[0] | SHORT
    (small / "lora.yml").write_text(yaml.safe_dump({key: value for key, value in written.items() if value is not None}))
    commands = [shlex.split(command) for command in documented_commands(GUIDE)]
    assert len(commands) >= 8
    for words in commands:
        assert words[0] == "python"
        if words[1:2] == ["deepy.py"] and not (small / "model.yml").exists():
            keys = yaml.safe_load((tmp_path / "converted/llama31-8b/model.yml").read_text())
            keys = {name: value for name, value in keys.items() if name not in ("tokenizer_type", "vocab_file")}
            (small / "model.yml").write_text(yaml.safe_dump(keys))
        program = str(ROOT / words[1]) if words[1].endswith(".py") else words[1]
        printed = run([sys.executable, program, *words[2:]], tmp_path)
        if "--adapter" in words:
            assert "rounding error relative to the adapter's part" in printed
        if "--dry-run" in words:
            assert "fits: at most" in printed
        if "70b" in " ".join(words) and "--dry-run" in words:
            assert "at most 22.4 GiB" in printed  # the guide quotes it
    assert (tmp_path / "checkpoints/llama31-8b-lora/global_step2/adapter/adapter_model.safetensors").is_file()
    assert "--nodes=1" in (tmp_path / "lora.sh").read_text() or "-N 1" in (tmp_path / "lora.sh").read_text()
