"""examples/astropt, shortened, and every command in its README and in docs/patches.md."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.documentation import documented_commands, run_in_root

pytest.importorskip("galsim")
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(2400)]

README, GUIDE = "examples/astropt/README.md", "docs/patches.md"
WHOLE = ("python examples/astropt/run.py", "python examples/astropt/scaling.py")  # shortened here
COMMANDS = [
    command
    for page in (README, GUIDE)
    for command in documented_commands(page)
    if command not in WHOLE and not command.startswith("pip ")
]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("astropt") / "out"
    words = WHOLE[0].split()[1:]
    short = ["--output", str(out), "--train", "1500", "--probe", "800", "--steps", "450"]
    result = run_in_root([sys.executable, *words, *short], timeout=2000)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return out


def test_training_teaches_what_probes_read(example: Path) -> None:
    means = json.loads((example / "probe.json").read_text())["mean_r2"]
    assert means["trained"] - means["untrained"] >= 0.15
    assert set(means) == {"trained", "untrained", "inputs"}, "and the pixels are reported, whatever they say"
    report = (example / "report.md").read_text()
    assert f"{means['inputs']:.3f}" in report
    lines = (example / "logs/metrics.jsonl").read_text().splitlines()
    losses = [entry["validation/huber_loss"] for entry in map(json.loads, lines) if "validation/huber_loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


def test_transformers_computes_the_same_vectors(example: Path) -> None:
    ours, theirs = (np.load(example / f"vectors/{name}.npy") for name in ("trained", "transformers"))
    assert ours.shape == theirs.shape == (800, 4, 64)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_real_galaxies_are_put_in_order(example: Path) -> None:
    """Most of what can be measured on images of another telescope is predicted far above chance (0.055)."""
    correlations = json.loads((example / "hubble/predictions.json").read_text())
    assert set(correlations) == {"mag_r", "g_r", "log_re", "axis_ratio"}
    assert sum(correlations[name] > 0.2 for name in ("mag_r", "log_re", "axis_ratio")) >= 2
    assert (example / "hubble/predictions.png").read_bytes().startswith(b"\x89PNG")


def test_images_are_continued(example: Path) -> None:
    for folder in ("completions", "hubble"):
        with np.load(example / folder / "completions.npz") as archive:
            assert archive["completed"].shape == (8, 64, 64, 3)
            assert np.isfinite(archive["completed"]).all()
        assert (example / folder / "completions.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_command(command: str, example: Path) -> None:
    words = shlex.split(command.replace("astropt_out", str(example)))
    assert words[0] == "python"
    result = run_in_root([sys.executable, *words[1:]])
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}{result.stderr[-2000:]}"


def test_sizes_are_compared(tmp_path: Path) -> None:
    words = WHOLE[1].split()[1:]
    short = ["--output", str(tmp_path), "--train", "200", "--probe", "200", "--steps", "10", "--seeds", "1"]
    result = run_in_root([sys.executable, *words, *short], timeout=1000)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    points = json.loads((tmp_path / "scaling.json").read_text())
    assert [one["hidden_size"] for one in points] == [32, 64, 128]
    assert (tmp_path / "scaling.png").exists()
