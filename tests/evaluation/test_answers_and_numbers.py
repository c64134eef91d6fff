"""Reading questions and answers, and computing the statistics of a test, without a model."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from megatron.evaluation.cost_picture import efficiency_gain, main, read_table
from megatron.evaluation.multiple_choice.items import ItemError, read_items
from megatron.evaluation.multiple_choice.parse_answer import parse_answer, without_thinking
from megatron.evaluation.multiple_choice.statistics import (
    calibration_error,
    compare_paired,
    mcnemar_exact,
    wilson_interval,
)
from megatron.evaluation.rolling import rolling_pairs
from megatron.neox_arguments.keys.evaluation import McqKeys
from tests.support.documentation import ROOT
from tests.support.evaluation_models import write_questions

pytestmark = pytest.mark.unit
OPTIONS = ("Cancer", "Tucana", "Scorpius", "Coma Berenices")


@pytest.mark.parametrize(
    ("text", "choice", "how"),
    [
        ('{"ANSWER": "B", "EXPLANATION": "because {x}"}', 1, "json"),
        ('Sure.\n```json\n{"answer": "C: Scorpius",\n "EXPLANATION": "line\nbreak"}\n```', 2, "json"),
        ('{"ANSWER": "Tucana"}', 1, "json"),
        ('{"ANSWER": "A"} No, wait: {"ANSWER": "D"}', 3, "json"),
        ('{"ANSWER": "E"}', None, "unparsed"),
        ('{"ANSWER": "B", "EXPLANATION": "cut off here', 1, "regex"),
        ("The answer is (C).", 2, "regex"),
        ("ANSWER: A, though at first my answer was B. Final answer: D", 3, "regex"),
        ("**Answer:** B", 1, "regex"),
        ("Answer: B. Tucana", 1, "regex"),
        ("C", 2, "regex"),
        ("D) Coma Berenices", 3, "regex"),
        ("The answer depends on the star.", None, "unparsed"),
        ("An answer a physicist gives", None, "unparsed"),
        ("Answer: Aquila", None, "unparsed"),
        ("Cancer or Tucana", None, "unparsed"),
        ("", None, "unparsed"),
    ],
)
def test_answers_are_read(text: str, choice: int | None, how: str) -> None:
    found = parse_answer(text, "ABCD", OPTIONS)
    assert (found.choice, found.how) == (choice, how)


def test_only_what_follows_the_reasoning_is_read() -> None:
    text = 'Perhaps {"ANSWER": "A"}.</think>\n\n{"ANSWER": "B"}'
    assert parse_answer(without_thinking(text), "ABCD", OPTIONS).choice == 1
    assert without_thinking("no end") == "no end"


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_three_formats_hold_the_same_questions(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in write_questions(tmp_path / "a.jsonl").read_text().splitlines()]
    rows[0]["question"] = 'Commas, "quotes",\nand a line break?'
    keys = McqKeys(topic_field="topic")
    found = [read_items(_write(tmp_path / f"b{ending}", rows), keys) for ending in (".jsonl", ".csv", ".parquet")]
    assert found[0] == found[1] == found[2]
    assert [item.answer for item in found[0]] == [0, 2, 1, 3, 1, 0, 2, 3]
    assert found[0][0].question == rows[0]["question"]


def test_answers_may_be_letters_indices_or_texts(tmp_path: Path) -> None:
    row = {"q": "?", "choices": ["w", "x", "y"]}
    rows = [row | {"a": answer} for answer in ("B", "b", 1, "1", "x")]
    keys = McqKeys(question_field="q", option_fields=["choices"], answer_field="a")
    assert [item.answer for item in read_items(_write(tmp_path / "q.jsonl", rows), keys)] == [1] * 5


GOOD = {"question": "q", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "A"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no questions"),
        ([GOOD, {**GOOD, "answer": "E"}], "1 of 2 rows cannot be used: row 1: answer 'E' is not one of ABCD"),
        ([{**GOOD, "B": "1"}], "two options are the same"),
        ([{**GOOD, "C": ""}], "no text in C; the columns are question, A, B, C, D, answer"),
        ([{"prompt": "q"}], "no text in question; the columns are prompt"),
        ([GOOD, {**GOOD, "answer": None}], "1 of 2 rows have an answer, row 1 has none"),
        ([{**GOOD, "answer": True}], "answer True is not one of"),
    ],
)
def test_rows_that_cannot_be_used_are_named(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ItemError) as caught:
        read_items(path, McqKeys())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"), [("q.jsonl", b"{"), ("q.parquet", b"no"), ("q.txt", b"x"), ("q.csv", b"\xff")]
)
def test_files_that_cannot_be_read_are_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ItemError, match=name):
        read_items(tmp_path / name, McqKeys())


@pytest.mark.parametrize(("correct", "n"), [(0, 5), (3, 8), (8, 8), (3814, 4425)])
def test_intervals_are_wilson_s(correct: int, n: int) -> None:
    theirs = binomtest(correct, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(correct, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_the_interval_of_the_paper() -> None:
    low, high = wilson_interval(round(0.862 * 4425), 4425)
    assert (round(100 * low, 1), round(100 * high, 1)) == (85.1, 87.2)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (9, 2), (2, 9), (40, 40), (700, 500)])
def test_mcnemar_is_exact(gained: int, lost: int) -> None:
    expected = binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    assert mcnemar_exact(gained, lost) == pytest.approx(expected, rel=1e-9)


def test_flips_are_counted() -> None:
    found = compare_paired([True, True, False, False], [True, False, True, False])
    assert (found.gained, found.lost, found.negative_flip_rate) == (1, 1, 0.25)


def test_calibration_error() -> None:
    # Two bins: stated confidence 0.9 with half right, and 0.2 with none right.
    assert calibration_error([0.9, 0.9, 0.2, 0.2], [True, False, False, False]) == pytest.approx(0.3)
    assert calibration_error([1.0, 0.0], [True, False]) == 0


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 16, 21])
def test_rolling_pairs_score_each_token_once(length: int) -> None:
    ids = tuple(range(100, 100 + length))
    pairs = rolling_pairs(ids, 1, 8)
    assert tuple(token for pair in pairs for token in pair.continuation) == ids
    whole = (1, *ids)
    for pair in pairs:
        joined = pair.context + pair.continuation
        assert len(joined) <= 9
        place = whole.index(pair.continuation[0])
        assert whole[place - len(pair.context) : place + len(pair.continuation)] == joined


def test_costs_and_gains(tmp_path: Path) -> None:
    summary = {"accuracy": 0.7, "n": 100, "tokens": 50_000, "seconds": 1800.0}
    (tmp_path / "s.json").write_text(json.dumps(summary))
    table = tmp_path / "t.csv"
    table.write_text(
        "# a comment\nmodel,cost,accuracy,correct,n,base,summary,price_per_hour\n"
        "base,0.1,72.5,,40,,,\nours,1,,30,40,base,,\nown,,,,,,s.json,2.0\n"
    )
    base, ours, own = read_table(table)
    assert ours.accuracy == 75
    assert own.cost == pytest.approx(2.0)  # half an hour at 2 USD for 0.05M tokens
    # 2.5 points more at ten times the cost; the family needs 10 ** (2.5 / 3.5) times the cost for them.
    assert efficiency_gain(ours, base) == pytest.approx(10 ** (2.5 / 3.5 - 1))
    assert main([str(table), str(tmp_path / "p.svg")]) == 0
    picture = (tmp_path / "p.svg").read_text()
    assert all(name in picture for name in ("base", "ours", "own", "Wilson"))


@pytest.mark.parametrize(
    ("accuracy", "cost", "told"),
    [
        (60.5, 1, "1e+03 times its cost efficiency"),  # three lines
        (60.6, 1, "beyond the fit"),
        (39.5, 1, "0.001 times its cost efficiency"),
        (39.4, 1, "beyond the fit"),
        (72.8, 1, "beyond the fit"),
        (60.6, 10, "107 times its cost efficiency"),  # the distance along the lines counts, not the points alone
        (50, 2e3, "beyond the fit"),
    ],
)
def test_gains_are_reported_only_within_the_fit(
    accuracy: float, cost: float, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.csv").write_text(f"model,cost,accuracy,n,base\nbase,1,50,400,\nours,{cost},{accuracy},400,base\n")
    assert main([str(tmp_path / "t.csv"), str(tmp_path / "p.svg")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "points over base" in line]
    assert line.endswith(told)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "has no rows"),
        ("a,1,70,100,b\n", "a is made from b, which has no row"),
        ("a,1,70,100,\na,1,70,100,\n", "a has two rows"),
        ("a,0,70,100,\n", "expected cost and n above 0"),
        ("a,x,70,100,\n", "row 1: could not convert"),
    ],
)
def test_tables_that_cannot_be_drawn_are_named(
    rows: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.csv").write_text("model,cost,accuracy,n,base\n" + rows)
    assert main([str(tmp_path / "t.csv"), str(tmp_path / "p.png")]) == 2
    assert message in capsys.readouterr().err


def test_published_points_match_the_text_of_the_paper() -> None:
    ours, base = read_table(ROOT / "docs" / "astrosage_figure3.csv")
    assert (ours.accuracy, ours.n, ours.base) == (86.2, 4425, base.model)
    assert efficiency_gain(ours, base) == pytest.approx(100)
