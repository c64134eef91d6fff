"""examples/astrosage from raw text to a chat model, shortened, and every command that its README shows."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.support.documentation import documented_commands, run_in_root

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(2400)]

README = "examples/astrosage/README.md"
WHOLE = "python examples/astrosage/run.py"  # the fixture runs it, shortened


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(output folder, what was printed)"""
    out = tmp_path_factory.mktemp("astrosage") / "out"
    short = ["--output", str(out), "--share", "0.3", "--conversations", "300"]
    result = run_in_root([sys.executable, *WHOLE.split()[1:], *short], timeout=2000)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return out, result.stdout


def test_the_report_says_what_happened(example: tuple[Path, str]) -> None:
    out, printed = example
    report = (out / "report.md").read_text()
    assert report.split("\n\n", 1)[1].strip() in printed
    row = r"^\| ([a-z ]+?) +\| (\d\.\d+) +\| (\d\.\d+) +\| (\d\.\d+)"
    rows = {name: [float(loss) for loss in losses] for name, *losses in re.findall(row, report, re.MULTILINE)}
    assert set(rows) == {"astronomy", "general", "answers about astronomy"}
    assert rows["astronomy"][1] < rows["astronomy"][0] - 0.2, "the domain is learned"
    assert rows["general"][1] < rows["general"][0] + 0.05, "replay keeps the rest"
    assert rows["answers about astronomy"][2] < rows["answers about astronomy"][1] - 0.3, "and the answers"
    shares = [float(x) for x in re.findall(r"general_text_document: .*?(\d+\.\d+)% of the run", report)]
    assert shares == [pytest.approx(20, abs=0.1)]
    difference = re.search(r"Largest difference to transformers' loss.*: (\S+)\.\n", report)
    assert difference is not None
    assert float(difference[1]) < 1e-5
    checked = json.loads((out / "check.json").read_text())
    assert set(checked) == {"base", "cpt", "sft"}
    assert (out / "loss_cpt.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", [c for c in documented_commands(README) if c != WHOLE])
def test_documented_command(command: str, example: tuple[Path, str]) -> None:
    out, _ = example
    for name in ("cpt", "sft"):
        command = command.replace(f"examples/astrosage/{name}.yml", f"{out}/yml/{name}.yml")
    words = shlex.split(command.replace("astrosage_out", str(out)))
    assert words[0] == "python"
    extra = ["--train_iters", "2", "--train_epochs", "null", "--save", "null"] if "train.py" in words else []
    result = run_in_root([sys.executable, *words[1:], *extra])
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
