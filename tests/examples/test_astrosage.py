"""examples/astrosage, shortened: its steps work. Slow: its claims hold, the whole recipe, all commands of its pages."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.documentation import documented_commands, run_in_root

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(2400)]

PAGES = ("examples/astrosage/README.md", "docs/releasing.md", "docs/reporting.md")
WHOLE = "python examples/astrosage/run.py"  # the fixture runs it, shortened
WORDINGS = ("held", "held_new_wording")


def run_example(out: Path, size: str, *options: str) -> str:
    words = [sys.executable, *WHOLE.split()[1:], "--output", str(out), "--size", size, *options]
    result = run_in_root(words, timeout=2300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def pretrained(out: Path, size: str) -> dict[str, Any]:
    """results.json of a base model and its continued pre-training."""
    printed = run_example(out, size, "--until", "cpt")
    assert (out / "results.md").read_text().strip() in printed
    assert "OpenNGC by Mattia Verga, CC-BY-SA 4.0" in printed
    assert json.loads((out / "contamination/summary.json").read_text())["contaminated"] == 0
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    return results


def test_steps_work_and_scores_agree(tmp_path: Path) -> None:
    """There are too few facts and steps to learn more than the style of the domain's documents."""
    out = tmp_path / "out"
    assert_scores_agree(pretrained(out, "tiny"))
    lines = [json.loads(line) for line in (out / "logs/cpt/metrics.jsonl").read_text().splitlines()]
    losses = [line["train/lm_loss"] for line in lines if "train/lm_loss" in line]
    assert sum(losses[-10:]) / 10 < losses[0] - 1


def assert_scores_agree(results: dict[str, Any]) -> None:
    """With those of two tensor-parallel ranks and of transformers."""
    difference, other = results["layouts"]
    assert 0 < difference < 1e-4
    assert other == 0
    theirs = results["transformers"]["cpt"]
    assert 0 < theirs["largest_difference"] < 1e-4
    assert (theirs["other_choices"], theirs["other_prompts"]) == (0, 0)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return pretrained(tmp_path_factory.mktemp("taught") / "out", "short")


@pytest.mark.slow
@pytest.mark.parametrize("wording", WORDINGS)
def test_continued_pretraining_teaches_facts(taught: dict[str, Any], wording: str) -> None:
    """The base model is at chance, and the gain is specific to facts in the documents."""
    tests = taught["tests"][wording]
    assert tests["base_against_chance_p"] > 1e-3, "inside 99.9 % of chance"
    assert tests["gained"] > tests["lost"]
    assert tests["cpt_against_base_p"] < 1e-3
    assert tests["cpt_against_control_p"] < 1e-3


@pytest.mark.slow
def test_general_facts_are_kept(taught: dict[str, Any]) -> None:
    right, asked = taught["counts"]["base"]["general"]
    assert right > 0.6 * asked, "the base model answers questions"
    assert taught["tests"]["general_points_lost"]["cpt"] < 15


@pytest.mark.slow
def test_sentences_of_documents_are_known(taught: dict[str, Any]) -> None:
    right, begun = taught["completed"]
    assert right >= 0.95 * begun


@pytest.mark.slow
def test_scores_are_those_of_another_layout_and_of_transformers(taught: dict[str, Any]) -> None:
    assert_scores_agree(taught)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole recipe."""
    out = tmp_path_factory.mktemp("astrosage") / "out"
    printed = run_example(out, "short")
    assert "complete and unchanged since the release" in printed
    return out


@pytest.mark.slow
def test_the_whole_recipe(example: Path) -> None:
    results = json.loads((example / "results.json").read_text())
    assert set(results["counts"]) >= {"base", "cpt", "sft", "merge", "merge_own_base"}
    assert results["transformers"]["merge"]["largest_difference"] < 1e-4
    assert results["transformers"]["merge"]["other_prompts"] == 0
    for thinking in ("on", "off"):
        lines = [json.loads(line) for line in (example / f"chat_{thinking}.jsonl").read_text().splitlines()]
        assert len(lines) == 6
        assert all(("reasoning_content" in line) == (thinking == "on") for line in lines)
    page = (example / "report/page.html").read_text()
    for title in ("Training dynamics", "Composition of the training data", "Accuracy against cost"):
        assert title in page


COMMANDS = [
    pytest.param(page, command, id=f"{page}-{number}")
    for page in PAGES
    for number, command in enumerate(documented_commands(page))
    if command != WHOLE
]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_documented_command(page: str, command: str, example: Path) -> None:
    for name in ("cpt", "sft", "merge", "release"):
        command = command.replace(f"examples/astrosage/{name}.yml", f"{example}/yml/{name}.yml")
    words = shlex.split(command.replace("astrosage_out", str(example)))
    assert words[0] == "python"
    if "documents.py" in command:
        words[words.index("--output") + 1] += "_other"
    if "make" in words:
        words[words.index("--output") + 1] += page.replace("/", "_")
    extra = ["--train_iters", "2", "--train_epochs", "null"] if "train.py" in words else []
    if "train.py" in words and "--save" not in words:
        extra += ["--save", "null"]
    result = run_in_root([sys.executable, *words[1:], *extra])
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
