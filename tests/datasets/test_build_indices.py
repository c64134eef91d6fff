"""build_indices.py: a run reads exactly what it prepared, and it reports damage and mistakes."""

from pathlib import Path

import pytest
import yaml

from megatron.data.build import build_datasets
from megatron.neox_arguments import NeoXArgs
from tests.support.data_commands import preprocess
from tests.support.text_files import write_texts
from tests.support.vocabulary import real_texts
from tools.datasets.build_indices import main

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def yml(vocab_folder: Path, tmp_path: Path) -> Path:
    for name, texts in (("a", real_texts()[:20]), ("b", real_texts()[20:30])):
        assert (
            preprocess(vocab_folder, tmp_path / name, write_texts(tmp_path / f"{name}.jsonl", texts), append_eod=True)
            == 0
        )
    keys = yaml.safe_load((ROOT / "configs/tiny/run.yml").read_text())
    for key in (
        "load",
        "save",
        "finetune",
        "checkpoint_factor",
        "keep_last_n_checkpoints",
        "log_dir",
        "tensorboard_dir",
    ):
        keys.pop(key, None)
    keys.pop("train_data_weights")
    keys |= {
        "from_scratch": True,
        "vocab_file": str(vocab_folder / "tokenizer.json"),
        "train_data_paths": [
            str(tmp_path / "a_text_document"),
            {"path": str(tmp_path / "b_text_document"), "replay": {"share": 0.25}},
        ],
        "valid_data_paths": [str(tmp_path / "b_text_document")],
        "seq_length": 64,
    }
    (tmp_path / "run.yml").write_text(yaml.safe_dump(keys))
    return tmp_path / "run.yml"


def indices(folder: Path) -> dict[Path, int]:
    """Every array of every index below a folder, with its modification time."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}


def test_training_only_reads_afterwards(yml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(ROOT / "configs/tiny/model.yml")
    assert main([model, str(yml), "--world-size", "2", "--check-content"]) == 0
    out = capsys.readouterr().out
    assert "a_text_document: offsets, ids and checksum are correct" in out
    assert "25.00% of the run" in out
    assert "2 sources ready" in out

    prepared = indices(yml.parent)
    assert prepared
    args = NeoXArgs.from_ymls([model, yml], world_size=2)
    assert len(build_datasets(args).train) == args.train_iters * args.train_batch_size
    assert indices(yml.parent) == prepared


def test_damage_and_mistakes_are_named(yml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(ROOT / "configs/tiny/model.yml")
    path = yml.parent / "a_text_document.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    assert main([model, str(yml), "--world-size", "2"]) == 0
    assert main([model, str(yml), "--world-size", "2", "--check-content"]) == 2
    assert "a_text_document.bin: checksum" in capsys.readouterr().err
    path.write_bytes(content[:-2])
    assert main([model, str(yml), "--world-size", "2"]) == 2
    assert "a_text_document.bin" in capsys.readouterr().err
    assert main([model, "--world-size", "2"]) == 2
