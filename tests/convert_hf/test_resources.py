"""Memory does not grow with the model; few libraries are imported; the command runs from any directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

from tests.support.hf_folders import Model, convert, write_hf

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
COMMAND = ROOT / "tools" / "convert_hf"

# Runs the command in its own process and prints the peak of its anonymous memory in MiB.
MEASURE = """
import runpy, sys, threading, time
peak, stop = 0, False
def watch():
    global peak
    while not stop:
        with open("/proc/self/status") as file:
            lines = [line.split() for line in file if line.startswith(("RssAnon", "RssShmem"))]
            peak = max(peak, sum(int(line[1]) for line in lines))
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
code = 0
try:
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as error:
    code = error.code
stop = True
thread.join()
print("peak", peak / 1024)
sys.exit(code)
"""


# Runs the command once for each list of words, all in one process, and stops at the first that fails.
ONE_AFTER_ANOTHER = """
import json, runpy, sys
command, verbs = sys.argv[1:]
for words in json.loads(verbs):
    sys.argv = [command, *map(str, words)]
    try:
        runpy.run_path(command, run_name="__main__")
    except SystemExit as error:
        if error.code:
            sys.exit(f"{words} ended with exit code {error.code}")
"""
VENDOR = ["transformers", "deepspeed", "megatron", "pydantic", "tokenizers"]  # installed: megatron-core


def peak_mib(*words: object) -> float:
    run = [sys.executable, "-c", MEASURE, str(COMMAND), *map(str, words), "--quiet"]
    done = subprocess.run(run, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return float(done.stdout.rsplit("peak", 1)[1])


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """117 MB of weights, the embedding alone 33 MB."""
    model = Model(layers=3, heads=16, kv_heads=4, head_dim=64, intermediate=2048, vocab=16000)
    write_hf(tmp_path / "hf", model)
    return tmp_path


def test_memory_is_bounded(large: Path) -> None:
    """Each direction stays under the given limit, which is smaller than the model."""
    size = sum(p.stat().st_size for p in (large / "hf").glob("*.safetensors"))
    assert size > 110 << 20
    limit = ("--max-ram", "80MiB")
    assert peak_mib("to-neox", "--input", large / "hf", "--output", large / "neox", "--tp", 4, *limit) < 80
    assert peak_mib("to-hf", "--input", large / "neox", "--output", large / "back", *limit) < 80
    assert peak_mib("reshard", "--input", large / "neox", "--output", large / "one", "--tp", 1, *limit) < 80
    cast = ("--dtype", "fp32", "--max-ram", "400MiB")
    assert peak_mib("to-hf", "--input", large / "neox", "--output", large / "wide", *cast) < 400
    assert peak_mib("verify", large / "hf", large / "neox", "--forward") < 512


def test_too_little_memory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "hf", Model())
    common = ("--input", tmp_path / "hf", "--output", tmp_path / "out", "--tp", 1)
    convert("to-neox", *common, "--max-ram", "20MiB", expect=2)
    assert "give at least 49 MiB" in capsys.readouterr().err
    convert("to-neox", *common, "--max-ram", "49MiB")


# The permitted requirements of the command; the test's environment has nothing else.
ALLOWED = (
    "torch",
    "safetensors",
    "yaml",
    "_yaml",
    "tqdm",
    "typing_extensions",
    "sympy",
    "mpmath",
    "networkx",
    "jinja2",
)
ALLOWED += ("markupsafe", "filelock", "fsspec", "torchgen", "functorch", "numpy", "numpy.libs")


def test_runs_in_an_environment_without_the_vendor_stack(tmp_path: Path) -> None:
    """All verbs, from another directory, in a virtual environment with only torch, safetensors, PyYAML and tqdm."""
    site = Path(torch.__file__).parents[1]
    venv.create(tmp_path / "bare", symlinks=True, with_pip=False)
    bare = next((tmp_path / "bare" / "lib").glob("python*")) / "site-packages"
    for name in ALLOWED:
        for path in (site / name, site / f"{name}.py", *site.glob(f"{name}-*.dist-info")):
            if path.exists():
                (bare / path.name).symlink_to(path)
    python = tmp_path / "bare" / "bin" / "python"
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [str(python), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)

    found = run("-c", f"from importlib.util import find_spec; print([n for n in {VENDOR} if find_spec(n)])")
    assert found.stdout == "[]\n", found.stderr
    write_hf(tmp_path / "hf", Model())
    verbs = (
        ("to-neox", "--input", "hf", "--output", "neox", "--tp", 2),
        ("to-neox", "--input", "hf", "--output", "cast", "--tp", 2, "--dtype", "fp32"),
        ("reshard", "--input", "neox", "--output", "one", "--tp", 1),
        ("to-hf", "--input", "neox", "--output", "back"),
        ("verify", "hf", "one", "--forward"),
        ("verify", "hf", "back"),
        ("inspect", "neox"),
    )
    done = run("-c", ONE_AFTER_ANOTHER, COMMAND, json.dumps(verbs))
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "back").glob("*.safetensors"))) == 1
    assert run(COMMAND, "--help").returncode == 0


def test_copying_needs_no_torch(tmp_path: Path) -> None:
    """Bit copies import neither torch nor numpy, so the command starts immediately."""
    write_hf(tmp_path / "hf", Model())
    guard = "import sys; sys.modules['torch'] = sys.modules['numpy'] = sys.modules['safetensors'] = None\n"
    verbs = (
        ("to-neox", "--input", "hf", "--output", "neox", "--tp", 2),
        ("reshard", "--input", "neox", "--output", "one", "--tp", 1),
        ("to-hf", "--input", "one", "--output", "back"),
        ("verify", "hf", "back"),
        ("verify", "back"),
        ("inspect", "neox"),
    )
    words = [sys.executable, "-c", guard + ONE_AFTER_ANOTHER, str(COMMAND), json.dumps(verbs)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_exported_folder_loads_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = Model(head_dim=8)
    state = write_hf(tmp_path / "hf", model, shards=2)
    convert("to-neox", "--input", tmp_path / "hf", "--output", tmp_path / "neox", "--tp", 2)
    convert("to-hf", "--input", tmp_path / "neox", "--output", tmp_path / "back")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert all(torch.equal(loaded.state_dict()[n], t) for n, t in state.items())
    assert loaded.config.rope_parameters["rope_type"] == "llama3"
    assert loaded.config.rope_parameters["factor"] == 8.0
