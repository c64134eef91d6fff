"""The page of a run: complete, self-contained, with a list of everything that could not be read."""

from __future__ import annotations

import base64
import json
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tools.report.cli import main
from tools.report.figures import smoothed
from tools.report.runs import read_run

pytestmark = pytest.mark.unit

SCORE = {"n": 40, "correct": 30, "accuracy": 0.75, "wilson_95": [0.6, 0.86]}
FIGURES = (
    *("figure1_dynamics", "figure2_composition", "figure3_cost", "accuracy", "validation", "gradient_norm"),
    *("throughput", "cleaning"),
)


def write_lines(path: Path, records: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_stage(folder: Path, steps: int, began: float, sources: dict[str, int], **start: Any) -> None:
    records: list[dict[str, Any]] = [{"iteration": 0, "time": began, "validation/general/lm_loss": 3.0}]
    for step in range(1, steps + 1):
        values = {"train/lm_loss": 4 / step, "train/learning_rate": 1e-3 / step, "train/grad_norm": 1.0 + step}
        records.append({"iteration": step, "time": began + step, **values, "runtime/tokens_per_sec": 100.0 + step})
    write_lines(folder / "metrics.jsonl", records)
    data = [{"source": f"/data/{name}_text_document", "samples": n, "passes": 1.5} for name, n in sources.items()]
    one = {"time": began, "iteration": 0, "consumed_samples": 0, "train_iters": steps, "batch": 4, "seq_length": 16}
    write_lines(folder / "starts.jsonl", [{**one, "layout": {"tp": 2, "pp": 1, "dp": 1}, "data": data, **start}])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Outputs of two stages, a test, a cleaning and a decontamination, as written by the commands."""
    out = tmp_path / "my <run>"
    write_stage(out / "logs/sft", 20, 2000.0, {"reasoning": 42, "astronomy": 31, "general": 27})
    overrides = [{"at": 100, "scale": 0.5}]
    write_stage(out / "logs/cpt", 150, 1000.0, {"astronomy": 80, "general": 20}, lr_overrides=overrides)
    test = {**SCORE, "chosen_letters": {}, "topics": {"held": SCORE, "control": SCORE}, "tokens": 9000, "seconds": 9.0}
    cleaning = {
        **{"output": "clean/astronomy.jsonl", "documents": 90, "kept": 80, "repaired": 3, "looping": 4},
        **{"loop_characters": 500, "dropped": {"max_loops": 6, "near_duplicate": 4}},
    }
    contamination = {"questions": 40, "documents": 80, "threshold": 0.8, "contaminated": 0}
    found = {"mcq/cpt": test, "clean/astronomy_report": cleaning, "contamination": contamination, "other": {"a": 1}}
    for name, content in found.items():
        (out / name).mkdir(parents=True)
        (out / name / "summary.json").write_text(json.dumps(content))
    return out


class Page(HTMLParser):
    """Every address that a page makes a browser request, its text, and its images."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        asking = ("src", "href", "srcset", "data", "poster", "action", "xlink:href", "background")
        self.addresses += [value or "" for name, value in attributes if name in asking]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def read_page(folder: Path) -> Page:
    text = (folder / "page.html").read_text()
    page = Page(text)
    assert page.open == [], "every element is closed"
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    for word in ("http:", "https:", "url(", "@import", "//cdn"):
        assert word not in text
    for address in page.addresses:
        image = base64.b64decode(address.removeprefix("data:image/png;base64,"), validate=True)
        assert image.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", image[16:24])
        assert width > 300
        assert height > 100
    return page


def test_the_page_needs_nothing_else(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--title", "A <title>", "--topic", "held"]) == 0
    page = read_page(run / "report")
    assert len(page.addresses) == len(FIGURES)
    assert {path.stem for path in (run / "report").glob("*.png")} == set(FIGURES)
    for text in ("A <title>", "my <run>", "Training dynamics (Figure 1)", "(1 here)", "30/40", "60.0 to 86.0"):
        assert text in page.text, text
    for text in ("TP2 PP1 DP1", "80.00", "42.00", "max_loops 6, near_duplicate 4", "9,600"):
        assert text in page.text, text
    said = capsys.readouterr().out
    assert said.index("cpt/metrics.jsonl: steps 0 to 150") < said.index("sft/metrics.jsonl: steps 0 to 20")
    assert "other/summary.json was not written by a known command" in said
    assert "other/summary.json was not written by a known command" in page.text
    assert main([str(run)]) == 0, "a second report does not read the first"


def test_stages_follow_each_other_and_repeated_steps_count_once(run: Path) -> None:
    found = read_run(run)
    assert [stage.name for stage in found.stages] == ["cpt", "sft"]
    assert found.offsets() == [0, 150]
    assert found.stages[0].overrides == [(100, 0.5)]
    path = run / "logs/cpt/metrics.jsonl"
    again = {"iteration": 150, "time": 3000.0, "train/lm_loss": 0.125}
    path.write_text(path.read_text() + json.dumps(again) + '\n[1]\n{"iteration": 151, "train/lm')
    stage = next(one for one in read_run(run).stages if one.name == "cpt")
    assert stage.curve("train/lm_loss")[-1] == (150, 0.125)
    assert stage.problems == ["2 lines are not records of a step and were skipped"]


def test_a_branch_that_goes_on_counting_has_no_offset(run: Path) -> None:
    records = [{"iteration": n, "time": 3000.0 + n, "train/lm_loss": 1.0} for n in range(170, 180)]
    write_lines(run / "logs/cooldown/metrics.jsonl", records)
    assert read_run(run).offsets() == [0, 150, 0]


def test_the_loss_is_averaged_over_the_last_steps() -> None:
    curve = [(n, float(n % 7)) for n in range(1, 101)]
    values = [value for _, value in curve]
    expected = [(n, pytest.approx(sum(values[max(0, n - 25) : n]) / min(n, 25))) for n in range(1, 101)]
    assert smoothed(curve) == expected


def test_any_metrics_file_and_two_runs(run: Path, tmp_path: Path) -> None:
    """A single metrics file, by itself and next to a whole run."""
    bare = tmp_path / "other/metrics.jsonl"
    write_lines(bare, [{"iteration": n, "train/lm_loss": 2.0} for n in (1, 2)])
    assert main([str(bare)]) == 0
    page = read_page(tmp_path / "other/report")
    assert len(page.addresses) == 1
    assert main([str(run), str(bare), "--output", str(tmp_path / "both"), "--price-per-hour", "2.5"]) == 0
    page = read_page(tmp_path / "both")
    assert "my <run>, other" in page.text


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "has no metrics.jsonl"), ('{"step": 1}\n', "has no record of a step"), ("", "has no record of a step")],
)
def test_nothing_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str) -> None:
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run/metrics.jsonl").write_text(content)
    assert main([str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("tools/report: ")
    assert not (tmp_path / "run/report").exists()


def test_bad_arguments(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert main([str(run), "--price-per-hour", "0"]) == 2
    assert "expected a price above 0" in capsys.readouterr().err
