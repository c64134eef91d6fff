"""examples/astrollama, shortened: its claims hold, its report is right, and every command of its README runs."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from examples.astrollama.questions import OPTIONS, make_questions
from examples.astrollama.report import MODELS, bootstrap
from tests.support.documentation import documented_commands, run_in_root

README = "examples/astrollama/README.md"
WHOLE = "python examples/astrollama/run.py"  # the fixture runs it, shortened
SHORT = ("--base-steps", "120", "--steps", "80", "--documents", "40")


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(output folder, what was printed)"""
    out = tmp_path_factory.mktemp("astrollama") / "out"
    result = run_in_root([sys.executable, *WHOLE.split()[1:], "--output", str(out), *SHORT], timeout=1500)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return out, result.stdout


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_report_says_what_happened(example: tuple[Path, str]) -> None:
    out, printed = example
    assert (out / "report.md").read_text().strip() in printed
    assert "rounding error relative to the adapter's part" in printed
    facts = json.loads((out / "report.json").read_text())
    assert facts["p"]["lora"] < 0.01
    assert facts["forgotten"]["lora"] <= 1.05
    domain = facts["rows"]["domain text, loss per token"]
    assert domain["lora"] < domain["base"]
    assert all(set(row) == set(MODELS) for row in facts["rows"].values())
    assert facts["checkpoint_bytes"]["lora"] < 0.3 * facts["checkpoint_bytes"]["full"]
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", [c for c in documented_commands(README) if c != WHOLE])
def test_documented_command(command: str, example: tuple[Path, str]) -> None:
    out, _ = example
    command = command.replace("examples/astrollama/train.yml", f"{out}/yml/train.yml")
    words = shlex.split(command.replace("astrollama_out", str(out)))
    result = run_in_root([sys.executable, *words[1:]])
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}{result.stderr[-2000:]}"


@pytest.mark.unit
def test_a_question_has_one_right_option() -> None:
    texts = [" ".join(f"w{number}_{place}" for place in range(40)) for number in range(10)] + ["too short"]
    questions = make_questions(texts, seed=0)
    assert len(questions) == 10
    for number, question in enumerate(questions):
        right = " ".join(f"w{number}_{place}" for place in range(24, 36))
        assert [option for option in OPTIONS if question[option] == right] == [question["answer"]]
    assert len({question["answer"] for question in questions}) > 1


@pytest.mark.unit
def test_the_bootstrap_tells_a_gain_from_noise() -> None:
    """Over documents weighted by tokens: a gain on all of them is certain, a gain on half of them is not."""
    rng = np.random.default_rng(1)
    before = {number: (4.0 + float(rng.normal(0, 0.3)), 50) for number in range(60)}
    better = {number: (loss - 0.1, tokens) for number, (loss, tokens) in before.items()}
    noise = {number: (loss + (-0.1 if number % 2 else 0.1), tokens) for number, (loss, tokens) in before.items()}
    assert bootstrap(before, better) == 1e-4
    assert 0.1 < bootstrap(before, noise) < 0.9
    one_long = {number: (loss + 0.1, tokens) for number, (loss, tokens) in before.items()}
    long = before | {0: (4.0, 100_000)}
    assert bootstrap(long, one_long | {0: (3.0, 100_000)}) < 0.5
