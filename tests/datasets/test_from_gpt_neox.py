"""Every command of docs/from-gpt-neox.md runs as written; the second line of its first block is parsed only."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from tokenizers import ByteLevelBPETokenizer

from megatron.data.indexed import IndexedFile, IndexedWriter
from megatron.launcher.command_line import parse_command_line
from tests.support.documentation import ROOT, code_blocks
from tests.support.gpt_neox_files import LLAMA, MACHINE, TRAINING
from tests.support.text_files import write_texts
from tests.support.vocabulary import real_texts

pytestmark = pytest.mark.unit

PAGE = "docs/from-gpt-neox.md"


@pytest.fixture
def workplace(vocab_folder: Path, tmp_path: Path) -> Path:
    """The files used on this page."""
    for name, keys in (("llama2/7B", LLAMA), ("llama/train_config", TRAINING), ("local_setup", MACHINE)):
        path = tmp_path / "configs" / f"{name}.yml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(keys))
    for name in ("tools", "deepy.py", "train.py", "megatron"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_texts(tmp_path / "corpus.jsonl", real_texts()[:3])
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(real_texts()[:2], vocab_size=400, special_tokens=["<|endoftext|>"])
    for folder in ("gpt2", "tokenizer", "data/shards"):
        (tmp_path / folder).mkdir(parents=True)
    trainer.save_model(str(tmp_path / "gpt2"))
    (tmp_path / "tokenizer/tokenizer.json").write_bytes((vocab_folder / "tokenizer.json").read_bytes())
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|eot_id|>{% endfor %}"
    config = {"eos_token": "<|end_of_text|>", "chat_template": template}
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    turns = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    for name in ("a", "b"):
        writer = IndexedWriter(tmp_path / "data/shards" / name, np.dtype(np.uint16))
        writer.add(np.arange(5))
        writer.finish()
    return tmp_path


def test_commands(workplace: Path) -> None:
    script = f'python() {{ "{sys.executable}" "$@"; }}\nset -e\n' + "\n".join(code_blocks(PAGE, "bash"))
    result = subprocess.run(
        ["bash", "-c", script], cwd=workplace, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("Dataset size in tokens is") == 2
    assert len(IndexedFile(str(workplace / "data/all_text_document"))) == 2


def test_the_first_lines(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = code_blocks(PAGE, "")[0].splitlines()
    printed, started = (re.sub(r"^python ", "", line).split() for line in block)
    result = subprocess.run([sys.executable, *printed], cwd=workplace, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "note: without effect here: " in result.stderr
    assert yaml.safe_load(result.stdout)["intermediate_size"] == 352
    monkeypatch.chdir(workplace)
    assert parse_command_line(started[1:]).overrides == {"load": "llama2-7b", "save": "runs/a"}
