"""The result of `pip install .`, used from an empty folder: the commands, and no generic top-level packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("megatron", "tools", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE")
TINY = """\
num_layers: 2
hidden_size: 16
num_attention_heads: 2
num_kv_heads: 2
intermediate_size: 32
vocab_size: 64
seq_length: 16
max_position_embeddings: 16
norm: rmsnorm
pos_emb: rotary
activation: swiglu
use_bias_in_attn_linear: false
from_scratch: true
train_iters: 2
train_micro_batch_size_per_gpu: 1
optimizer: {type: Adam, params: {lr: 0.001}}
train_data_paths: [nowhere]
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only the installed project."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    source.mkdir()
    for name in (*SOURCES, *(path.name for path in ROOT.glob("requirements*.txt"))):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(folder / "site"), str(source)], check=True)
    return folder / "site"


def _run(site: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(site)}
    arguments = [sys.executable, str(site / "bin" / command[0]), *command[1:]]
    return subprocess.run(arguments, cwd=folder, env=env, capture_output=True, text=True)


def test_no_generic_top_level_package_is_installed(site: Path) -> None:
    names = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"megatron", "neox_tools", "bin"}
    assert not (site / "megatron" / "__init__.py").exists()
    assert {path.name for path in (site / "bin").iterdir()} == {"deepy", "neox-convert", "neox-merge"}
    assert list((site / "megatron/tokenizer/chat_templates").glob("*.jinja"))


def test_programs_are_known_by_name(site: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yml").write_text(TINY)
    shown = _run(site, tmp_path, "deepy", "train", "tiny", "--print-config")
    assert shown.returncode == 0, shown.stderr
    assert "num_parameters:" in shown.stdout
    started = _run(site, tmp_path, "deepy", "train.py", "tiny.yml")
    assert started.returncode == 2
    assert "nowhere" in started.stderr
    unknown = _run(site, tmp_path, "deepy", "sing", "tiny.yml")
    assert "sing: no such script; the programs are train, eval, generate, mcq and embed" in unknown.stderr


@pytest.mark.parametrize("command", ["neox-convert", "neox-merge"])
def test_tools_are_commands(site: Path, tmp_path: Path, command: str) -> None:
    done = _run(site, tmp_path, command, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
