"""Every command of docs/data.md and docs/sft.md runs as written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
import zstandard

from tests.support.conversations import conversations
from tests.support.documentation import ROOT, code_blocks
from tests.support.text_files import write_records, write_texts
from tests.support.vocabulary import real_texts

pytestmark = pytest.mark.unit


@pytest.fixture
def workplace(vocab_folder: Path, tmp_path: Path) -> Path:
    """The files used on these pages."""
    texts = real_texts()
    for name, part in (("domain", texts[:20]), ("general", texts[40:60])):
        write_texts(tmp_path / f"{name}.jsonl", part)
    (tmp_path / "papers.jsonl.zst").write_bytes(zstandard.compress((tmp_path / "domain.jsonl").read_bytes()))
    (tmp_path / "general.jsonl.zst").write_bytes(zstandard.compress((tmp_path / "general.jsonl").read_bytes()))
    question = {"id": 1, "question": " ".join(texts[0].split()[:30]), "options": ["a supernova", "a comet"]}
    write_records(tmp_path / "questions.jsonl", [question])
    for tag in ("nemotron", "astronomy", "hermes"):
        write_records(tmp_path / f"{tag}.jsonl", conversations(20, tag))
    (tmp_path / "tokenizer").symlink_to(vocab_folder)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    (tmp_path / "model.yml").symlink_to(ROOT / "configs/tiny/model.yml")
    run = yaml.safe_load((ROOT / "configs/tiny/run.yml").read_text())
    for key in ("load", "save", "finetune", "checkpoint_factor", "keep_last_n_checkpoints", "train_data_weights"):
        run.pop(key, None)
    for key in ("log_dir", "tensorboard_dir"):
        run.pop(key, None)
    keys = yaml.safe_load(code_blocks("docs/data.md", "yaml")[0])
    keys["valid_data_paths"] = ["data/domain_text_document"]  # the page does not show the commands for further data
    (tmp_path / "run.yml").write_text(yaml.safe_dump({**run, **keys, "from_scratch": True, "vocab_file": "tokenizer"}))
    return tmp_path


@pytest.mark.parametrize("page", ["docs/data.md", "docs/sft.md"])
def test_commands(page: str, workplace: Path) -> None:
    script = f'python() {{ "{sys.executable}" "$@"; }}\nset -e\n' + "\n".join(code_blocks(page, "bash"))
    result = subprocess.run(
        ["bash", "-c", script], cwd=workplace, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    if page == "docs/data.md":
        assert "20.0" in next(line for line in result.stdout.splitlines() if line.startswith("train: data/general"))
        assert (workplace / "lengths.png").exists()
        (found,) = (workplace / "contamination/contaminated.jsonl").read_text().splitlines()
        assert json.loads(found)["questions"][0]["score"] == 1.0
    else:
        assert "[[More" in result.stdout
        keys = yaml.safe_load((workplace / "data/sft_train.yml").read_text())
        promised = yaml.safe_load(code_blocks(page, "yaml")[0])
        assert {key: keys[key] for key in ("pack_impl", "isolate_documents")}.items() <= promised.items()
        assert json.loads((workplace / "data/sft_general_document.json").read_text())["documents"] == 20
