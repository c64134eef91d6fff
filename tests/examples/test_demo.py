"""The demo, shortened, and every command of README.md and the guides to training and generation, on its files."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from scipy.stats import binomtest

from examples.astrosage.facts import constellation_names
from examples.astrosage.results import verdicts_of
from examples.demo_answers import p_values
from examples.steps import replace_output
from tests.support.documentation import documented_commands, run_in_root

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

MAKE = {  # target: the command it must run; `make test` runs this test, and the fixture below the demo's script
    "make demo": "python examples/demo.py",
    "make test": 'python -m pytest -m "not slow"',
}
TINY = "configs/tiny/model.yml configs/tiny/run.yml configs/tiny/local.yml"
STAND_INS = {  # files that the README names but only a user has
    "configs/llama31_8b/model.yml run.yml local.yml": TINY,
    "Meta-Llama-3.1-8B": "{out}/hf_base",
    "--load llama31-8b": "--load {out}/readme_neox",
    "--output llama31-8b": "--output {out}/readme_neox",
    "--input checkpoints": "--input {out}/checkpoints",
    "my-llama": "{out}/readme_hf",
    "prompts.txt": "{out}/prompts.txt",
    "samples.jsonl": "{out}/samples.jsonl",
    "questions.jsonl": "{out}/questions.jsonl",
    "answers.jsonl": "{out}/answers.jsonl",
    "demo_out": "{out}",
}


COMMANDS = [
    pytest.param(command, id=f"{page}-{number}")
    for page in ("README.md", "docs/training.md", "docs/generation.md")
    for number, command in enumerate(documented_commands(page))
    if command not in MAKE
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(output folder, printed text) of a demo of six steps, with a base model good enough to be accepted."""
    out = tmp_path_factory.mktemp("demo") / "out"
    options = ["--output", str(out), "--iterations", "6", "--base-steps", "120"]
    result = run_in_root([sys.executable, "examples/demo.py", *options])
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return out, result.stdout


def test_the_demo_shows_what_it_promises(demo: tuple[Path, str]) -> None:
    out, printed = demo
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    shown = printed[printed.index("what was shown") :]
    assert "largest difference" in shown
    checked = json.loads((out / "check.json").read_text())
    for topic in ("told", "in no text"):
        counts = [_right(out / "mcq" / when / "items.jsonl", topic) for when in ("before", "after")]
        (line,) = [line for line in shown.splitlines() if line.startswith(topic)]
        assert [int(number) for number in re.findall(r"(\d+) of 40 right", line)] == counts
    assert [*checked["before"]["answers"]] == [*checked["after"]["answers"]]
    assert len(checked["after"]["answers"]) == 3
    for question, answer in checked["after"]["answers"].items():
        (line,) = [line for line in shown.splitlines() if line.startswith(question)]
        assert line.endswith(f"after: {answer!r}")
        assert line.split(". Before")[0].removeprefix(question).strip() in constellation_names().values()
    before = json.loads((out / "before_eval_results.json").read_text())["results"]
    after = json.loads((out / "after_eval_results.json").read_text())["results"]
    assert before.keys() == after.keys() == checked["after"]["loss"].keys()
    for name in after:
        assert after[name]["loss"] == pytest.approx(checked["after"]["loss"][name], abs=1e-5)
        assert after[name]["loss"] != before[name]["loss"]
    names = {path.name for path in (out / "hf_trained").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= names
    for name in ("generation_config.json", "tokenizer.json"):
        assert (out / "hf_trained" / name).read_bytes() == (out / "hf_base" / name).read_bytes(), name
    configs = [json.loads((out / folder / "config.json").read_text()) for folder in ("hf_base", "hf_trained")]
    assert {**configs[0], "dtype": None} == {**configs[1], "dtype": None}, "only the trained weights' dtype may differ"


def _right(items: Path, topic: str) -> int:
    lines = [json.loads(line) for line in items.read_text().splitlines()]
    return sum(line["correct"] for line in lines if line["topic"] == topic)


def test_only_an_earlier_run_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for taken in ("thesis", "file"):
        with pytest.raises(SystemExit) as end:
            replace_output(tmp_path / taken, parser)
        assert end.value.code == 2
        assert f"{taken} exists and was not written by an example" in capsys.readouterr().err
    assert (tmp_path / "thesis/chapter1.tex").read_text() == "years of work"
    for _ in range(2):
        replace_output(tmp_path / "out", parser)
        assert len(list((tmp_path / "out").iterdir())) == 1
        (tmp_path / "out/loss.png").write_text("of an earlier run")


@pytest.mark.parametrize("script", ["demo", "astrosage/run", "astropt/run", "astropt/scaling", "astrollama/run"])
def test_an_example_leaves_other_folders_alone(script: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/measured.csv").write_text("years of work")
    result = run_in_root([sys.executable, f"examples/{script}.py", "--output", str(tmp_path)])
    assert result.returncode == 2
    assert "was not written by an example" in result.stderr
    assert (tmp_path / "data/measured.csv").read_text() == "years of work"


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_whole_demo_teaches_what_its_documents_tell(tmp_path: Path) -> None:
    """`make demo` itself: told facts end far above the control, from chance before training."""
    out = tmp_path / "out"
    result = run_in_root([sys.executable, "examples/demo.py", "--output", str(out)], timeout=2300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    before, after = (verdicts_of(out / "mcq" / when / "items.jsonl") for when in ("before", "after"))
    assert binomtest(sum(before["told"]), len(before["told"]), 0.25).pvalue > 1e-3
    assert binomtest(sum(after["in no text"]), len(after["in no text"]), 0.25).pvalue > 1e-3
    assert max(p_values(before, after).values()) < 1e-3
    checked = json.loads((out / "check.json").read_text())
    assert checked["before"]["answers"] != checked["after"]["answers"]


@pytest.mark.parametrize(("command", "means"), MAKE.items())
def test_make_targets(command: str, means: str) -> None:
    assert command in documented_commands("README.md")
    result = run_in_root([*command.split(), "--dry-run"])
    assert result.returncode == 0, result.stderr
    assert means in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_command(command: str, demo: tuple[Path, str]) -> None:
    out, _ = demo
    (out / "prompts.txt").write_text("The coordinate\nclass\n")
    (out / "questions.jsonl").write_text('{"prompt": "What is a class?", "id": 3}\n"Why?"\n')
    for shown, stand_in in STAND_INS.items():
        command = command.replace(shown, stand_in.format(out=out))
    words = shlex.split(command)
    assert words[0] == "python", f"{command}: tell this test how to run it"
    words[0] = sys.executable
    if "deepy.py" in words:
        words += overrides(words, out)
    result = run_in_root(words, typed="What is a class?\n/exit\n")
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
    if "--chat" in words and "-i" not in words:
        assert "tokens/s, ended by" in result.stderr
    elif "--chat" in words:
        records = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
        assert [(r["index"], r["sample"]) for r in records] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert records[0]["input"] == {"id": 3}
        assert all("reasoning_content" in r for r in records)
    elif "generate.py" in words:
        records = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        assert [r["context"] for r in records] == ["The coordinate", "class"]
        assert all(r["length"] == 16 or r["finished"] for r in records)


def overrides(words: list[str], out: Path) -> list[str]:
    """Options that move the paths of configs/tiny/run.yml to the test's folder and reduce steps and ranks."""
    moved = [
        *("--num_gpus", "4"),  # one data-parallel copy; the demo has run with two
        *("--vocab_file", f"{out}/tokenizer/tokenizer.json"),
        *("--valid_data_paths", f"[{out}/data/domain_valid_text_document]"),
        *("--train_data_paths", f"[{out}/data/domain_train_text_document]", "--train_data_weights", "[1.0]"),
        *("--log_dir", "null", "--tensorboard_dir", "null"),
    ]
    if "eval.py" in words:
        moved += ["--eval_results_prefix", f"{out}/documented_"]
    if "train.py" in words:
        moved += ["--train_iters", "1", "--save", "null", "--allow_high_initial_loss", "true"]
    if "--load" not in words:
        moved += ["--load", f"{out}/neox_start"]
    return moved
