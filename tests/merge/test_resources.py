"""A login node is sufficient: memory does not grow with the models, and few libraries are imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.hf_folders import Model, write_hf
from tests.support.merges import good_recipe, write_recipe
from tools.merge.job import MergeJob, MergeRequest
from tools.merge.recipe_file import parse_recipe

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
COMMAND = ROOT / "tools" / "merge"
FORBIDDEN = ("transformers", "deepspeed", "pydantic", "tokenizers", "peft", "mergekit", "matplotlib", "scipy")

RUN = """
import resource, runpy, sys
command, *words = sys.argv[1:]
sys.argv = [command, *words]
try:
    runpy.run_path(command, run_name="__main__")
except SystemExit as error:
    if error.code:
        raise
import tools.merge.job
print("modules", *sorted({name.partition(".")[0] for name in sys.modules}))
"""
PEAK = """
import sys, threading, torch
sys.path.insert(0, sys.argv[1])
from tools.merge.cli import main
def anonymous():
    with open("/proc/self/status") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith(("RssAnon", "RssShmem"))) / 1024
peak, stop, before = 0.0, threading.Event(), anonymous()
def watch():
    global peak
    while not stop.wait(0.002):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
code = main(sys.argv[2:])
stop.set()
watcher.join()
print("peak", before, peak)
sys.exit(code)
"""


def test_runs_from_anywhere_with_few_imports(folders: Path) -> None:
    recipe = write_recipe(folders / "merge.yml", good_recipe(folders))
    command = [sys.executable, "-c", RUN, str(COMMAND), str(recipe), "--output", str(folders / "out"), "--quiet"]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modules = done.stdout.rsplit("modules ", 1)[1].split()
    assert not set(FORBIDDEN) & set(modules)
    assert (folders / "out" / "README.md").is_file()
    done = subprocess.run([sys.executable, str(COMMAND), "--help"], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0
    assert "--verify" in done.stdout


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Models of 117 MB with a 33 MB tensor: apart from torch itself, the merge needs less than one model."""
    model = Model(layers=3, heads=16, kv_heads=4, head_dim=64, intermediate=2048, vocab=16000)
    state = model.state()
    for name in ("base", "a", "b"):
        write_hf(tmp_path / name, model, state)
    recipe = write_recipe(tmp_path / "merge.yml", good_recipe(tmp_path))
    words = [str(recipe), "--output", str(tmp_path / "out"), "--threads", "2", "--max-ram", "400MiB", "--quiet"]
    done = subprocess.run([sys.executable, "-c", PEAK, str(ROOT), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, peak = map(float, done.stdout.rsplit("peak", 1)[1].split())
    assert peak - before < 96
    assert peak < 400


def test_a_70b_and_twenty_parents_fit_the_default(tmp_path: Path) -> None:
    """Planned memory at the sizes of Llama-3.1-70B: bands shrink so that the limit holds."""
    wide = Model(layers=1, heads=8, kv_heads=8, head_dim=128, intermediate=28672, vocab=64)
    state = wide.state()
    for number in range(21):
        folder = tmp_path / f"m{number}"
        if number == 0:
            write_hf(folder, wide, state)
        else:
            folder.mkdir()
            for path in (tmp_path / "m0").iterdir():
                (folder / path.name).symlink_to(path)
    body = {
        "merge_method": "ties",
        "base_model": str(tmp_path / "m0"),
        "models": [str(tmp_path / f"m{i}") for i in range(1, 21)],
        "parameters": {"weight": 0.05, "density": 0.5},
    }
    sizes = []
    for count in (2, 20):
        job = MergeJob(
            parse_recipe(yaml.safe_load(yaml.safe_dump(body | {"models": body["models"][:count]})), "recipe"),
            MergeRequest(tmp_path / "out", max_ram=1 << 30, threads=4),
        )
        sizes.append((job.band, job.threads))
    assert sizes[0] == (4 << 20, 4)
    assert sizes[1][0] < 4 << 20
    assert sizes[1][1] == 4
