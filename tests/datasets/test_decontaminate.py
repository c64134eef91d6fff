"""decontaminate.py finds planted questions despite damage, and nothing else."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from megatron.common.errors import UserError
from tests.support.text_files import write_texts
from tools.datasets import decontaminate
from tools.datasets.decontamination.benchmark import read_benchmark
from tools.datasets.decontamination.overlap import BenchmarkQuestion, QuestionIndex, excerpt, fold
from tools.datasets.decontamination.planted import PLANTS
from tools.datasets.decontamination.threshold import Proportion

pytestmark = pytest.mark.unit

NOUNS = [
    "galaxy",
    "nebula",
    "quasar",
    "pulsar",
    "cluster",
    "filament",
    "halo",
    "disk",
    "bulge",
    "corona",
    "comet",
    "asteroid",
    "planet",
    "moon",
    "ring",
]
VERBS = [
    "orbits",
    "heats",
    "expels",
    "absorbs",
    "reflects",
    "scatters",
    "ionises",
    "compresses",
    "magnetises",
    "obscures",
]
PLACES = [
    "Orion",
    "Cygnus",
    "Draco",
    "Lyra",
    "Perseus",
    "Vela",
    "Carina",
    "Hydra",
    "Virgo",
    "Leo",
    "Aquila",
    "Cetus",
    "Pavo",
    "Grus",
    "Tucana",
]


def sentence(chance: random.Random) -> str:
    one, two = chance.sample(NOUNS, 2)
    return f"The {one} in {chance.choice(PLACES)} {chance.choice(VERBS)} a {two} of {chance.randrange(2, 900)} parsecs."


def documents(count: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(sentence(chance) for _ in range(chance.randrange(3, 9))) for _ in range(count)]


def questions(count: int, seed: int = 1) -> list[BenchmarkQuestion]:
    """Questions from the vocabulary of the documents, with a common beginning."""
    chance = random.Random(seed)
    made = []
    for number in range(count):
        one, two, three = chance.sample(NOUNS, 3)
        stem = (
            f"Which of the following is true of the {one} that {chance.choice(VERBS)} the {two} near the {three} in "
            f"{chance.choice(PLACES)}, observed in {chance.randrange(1800, 2020)}?"
        )
        made.append(BenchmarkQuestion(f"q{number}", stem, tuple(sentence(chance) for _ in range(4))))
    return made


def write_benchmark(path: Path, made: list[BenchmarkQuestion]) -> Path:
    lines = [json.dumps({"id": q.name, "question": q.question, "options": list(q.options)}) for q in made]
    path.write_text("\n".join(lines) + "\n")
    return path


def run(folder: Path, *more: str) -> dict[str, Any]:
    arguments = ["--benchmark", str(folder / "questions.jsonl"), "--input", str(folder / "corpus.jsonl")]
    assert decontaminate.main([*arguments, "--report", str(folder / "report"), "--workers", "2", *more]) == 0
    found: dict[str, Any] = json.loads((folder / "report/summary.json").read_text())
    return found


@pytest.mark.parametrize("way", sorted(PLANTS))
def test_a_planted_question_is_found_and_its_document_dropped(tmp_path: Path, way: str) -> None:
    made, texts = questions(40), documents(300)
    write_benchmark(tmp_path / "questions.jsonl", made)
    chance = random.Random(5)
    planted = {number: made[number // 10] for number in range(0, 300, 10)}
    for number, question in planted.items():
        texts[number] += "\n" + PLANTS[way](question, chance)
    write_texts(tmp_path / "corpus.jsonl", texts)
    summary = run(tmp_path, "--threshold", "0.45", "--output", str(tmp_path / "clean.jsonl"))

    listed = [json.loads(line) for line in (tmp_path / "report/contaminated.jsonl").read_text().splitlines()]
    assert {entry["line"] - 1: entry["questions"][0]["question"] for entry in listed} == {
        number: question.name for number, question in planted.items()
    }
    assert summary["contaminated"] == 30
    assert summary["found"].keys() >= {question.name for question in planted.values()}
    kept = [json.loads(line)["text"] for line in (tmp_path / "clean.jsonl").read_text().splitlines()]
    assert kept == [text for number, text in enumerate(texts) if number not in planted]


def test_the_threshold_is_chosen_and_judged_on_different_cases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_benchmark(tmp_path / "questions.jsonl", questions(60))
    write_texts(tmp_path / "corpus.jsonl", documents(2400))
    summary = run(tmp_path)
    chosen = summary["chosen"]
    assert not chosen["limited_by_plants"]
    assert set(chosen["recall"]) == set(PLANTS)
    for way in chosen["recall"].values():
        assert 20 <= way["cases"] <= 40, "about half of the questions"
        assert way["hits"] == way["cases"], summary
    assert 1000 <= chosen["documents_that_reach_it"]["cases"] <= 1400
    assert chosen["documents_that_reach_it"]["hits"] <= 3
    assert "found of planted questions, OCR: 100.00% of" in capsys.readouterr().out


def test_contamination_does_not_raise_the_threshold_without_limit(tmp_path: Path) -> None:
    """Two documents in a hundred contain a question: a threshold reached by one in a thousand would be above 1."""
    made, texts, chance = questions(60), documents(2400), random.Random(7)
    for number in range(0, 2400, 50):
        texts[number] += "\n" + PLANTS["verbatim"](chance.choice(made), chance)
    write_benchmark(tmp_path / "questions.jsonl", made)
    write_texts(tmp_path / "corpus.jsonl", texts)
    summary = run(tmp_path)
    assert summary["chosen"]["limited_by_plants"]
    assert summary["contaminated"] >= 48


def test_options_may_stand_in_any_order_and_the_question_alone_counts() -> None:
    made = questions(30)
    index = QuestionIndex(made)
    backwards = BenchmarkQuestion("", made[3].question, made[3].options[::-1])
    (found,) = index.find(PLANTS["verbatim"](backwards, random.Random(0)), 0.6)
    assert (found.question, found.score) == (3, 1.0)
    (alone,) = index.find(f"He asked: {made[4].question} Nobody knew.", 0.6)
    assert (alone.question, alone.score) == (4, 1.0)


def test_scattered_fragments_do_not_match_a_question() -> None:
    """The question's phrases, but far apart: an unordered set of shingles would match them."""
    made = questions(30)
    words = made[0].question.split()
    filler = " ".join(documents(20))
    spread = filler.join(" ".join(words[place : place + 4]) for place in range(0, len(words), 4))
    assert not [found for found in QuestionIndex(made).find(spread, 0.6) if found.question == 0]


def test_phrases_shared_by_all_questions_are_no_evidence() -> None:
    made = [
        BenchmarkQuestion(str(n), f"Which of the following statements is correct about object number {n * 7919}?")
        for n in range(50)
    ]
    index = QuestionIndex(made)
    assert index.find("Which of the following statements is correct about object number", 0.5) == []


def test_folding_keeps_letters_and_digits_of_any_script() -> None:
    assert fold("The ﬁrst  Star-\nlight") == fold("the fIrst starlight") == b"theflrststarllght"
    assert fold("Straße, 10 µm") == fold("STRASSE lO μM")
    assert fold("Épée") == fold("epee")
    assert fold("星系の問題") == "星系の問題".encode()
    assert fold("... \n --") == b""


def test_the_excerpt_is_the_matching_text() -> None:
    made = questions(5)
    text = f"{documents(1)[0]} {made[2].question} {documents(1, 9)[0]}"
    (found,) = QuestionIndex(made).find(text, 0.6)
    assert made[2].question.split()[-1].rstrip("?") in excerpt(text, found)
    assert len(excerpt(text, found)) < len(made[2].question) + 20


@pytest.mark.parametrize(
    ("hits", "cases", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (100, 100, 0.9630, 1.0)]
)
def test_wilson(hits: int, cases: int, low: float, high: float) -> None:
    """Values of statsmodels' proportion_confint(method="wilson")."""
    assert Proportion(hits, cases).interval == pytest.approx((low, high), abs=1e-4)


def test_questions_of_every_form(tmp_path: Path) -> None:
    forms = {
        "list.jsonl": '{"question": "Why?", "options": ["a", "b"]}\n',
        "object.json": '[{"prompt": "Why?", "choices": {"A": "a", "B": "b"}}]',
        "letters.csv": "id,question,A,B\n7,Why?,a,b\n",
        "column.csv": 'question,options\nWhy?,"[""a"", ""b""]"\n',
    }
    for name, content in forms.items():
        (tmp_path / name).write_text(content)
        (question,) = read_benchmark([str(tmp_path / name)])
        assert (question.question, question.options) == ("Why?", ("a", "b")), name
    assert read_benchmark([str(tmp_path / "letters.csv")])[0].name == "7"
    assert len({q.name for q in read_benchmark([str(tmp_path / name) for name in forms])}) == 4


def test_an_extra_csv_cell_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "letters.csv").write_text("question,A,B\nWhy, then?,a,b\n")
    with pytest.raises(UserError, match="line 2: more cells than the header has names; quote the commas"):
        read_benchmark([str(tmp_path / "letters.csv")])


@pytest.mark.parametrize(
    ("benchmark", "more", "said"),
    [
        ('{"text": "x"}\n', [], "no question; expected text in one of question, prompt, input, the fields are text"),
        ('{"question": "Why is the sky of Mars red at noon?", "options": 3}\n', [], "expected options as a list"),
        ('{"question": "Why?"}\n', [], "no question is long enough"),
        (None, ["--threshold", "0.1"], "--threshold 0.1: expected 0.3 to 1"),
        (None, [], "3 documents are too few to choose a threshold"),
        (None, ["--threshold", "0.6", "--output", "x.txt"], "expected a name that ends in .jsonl"),
    ],
)
def test_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], benchmark: str | None, more: list[str], said: str
) -> None:
    write_benchmark(tmp_path / "q.jsonl", questions(3))
    if benchmark is not None:
        (tmp_path / "q.jsonl").write_text(benchmark)
    write_texts(tmp_path / "corpus.jsonl", documents(3))
    command = ["--benchmark", f"{tmp_path}/q.jsonl", "--input", f"{tmp_path}/corpus.jsonl"]
    assert decontaminate.main([*command, "--report", f"{tmp_path}/report", *more]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "report").exists()
