"""The data of examples/astrosage, with fewer facts: which texts contain which facts, and cleaning of the damage."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from examples.astrosage import conversations, documents, wordings
from examples.astrosage.facts import distractors, facts_of
from tests.support.documentation import ROOT
from tools.datasets import clean_corpus

pytestmark = pytest.mark.unit

SIZES = ("--objects", "30", "40", "20", "--famous", "20", "--elements", "110", "--times", "40", "--base-times", "60")


def lines(path: Path) -> list[dict[str, str]]:
    data = path.read_bytes()
    if path.suffix == ".zst":
        data = zstandard.ZstdDecompressor().stream_reader(data).read()
    return [json.loads(line) for line in data.splitlines()]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("facts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["documents.py", "--output", str(folder), "--seed", "3", *SIZES])
        assert documents.main() == 0
        patch.setattr("sys.argv", ["conversations.py", "--output", str(folder), "--seed", "3", "--count", "300"])
        assert conversations.main() == 0
    return folder


def names(out: Path, role: str) -> set[str]:
    return {one["name"] for one in json.loads((out / "facts.json").read_text())[role]}


def texts(path: Path) -> str:
    return "\n".join(json.dumps(record) for record in lines(path))


def test_nobody_knows_what_the_control_is_asked(out: Path) -> None:
    files = [path for path in out.rglob("*.jsonl*") if path.name != "questions.jsonl"]
    assert len(files) > 8
    control = names(out, "control")
    for path in files:
        text = texts(path)
        assert not control & set(re.findall(r"\w+", text)), path
    asked = Counter(record["topic"] for record in lines(out / "questions.jsonl"))
    assert asked == {"held": 40, "held_new_wording": 40, "control": 20, "control_new_wording": 20, "general": 110}


def test_held_facts_are_told_and_never_asked(out: Path) -> None:
    held = names(out, "held")
    assert held <= set(re.findall(r"\w+", texts(out / "raw/astronomy.jsonl.zst")))
    for name in ("base/text.jsonl", "raw/general.jsonl.zst", "sft/reasoning.jsonl", "sft/astronomy.jsonl"):
        words = set(re.findall(r"\w+", texts(out / name)))
        assert not held & words, name
    asked = {one["name"] for one in json.loads((out / "facts.json").read_text())["general_held"]}
    for name in ("sft/general.jsonl", "sft/reasoning.jsonl"):
        assert not asked & set(re.findall(r"\w+", texts(out / name))), name
    for record in lines(out / "base/text.jsonl"):
        if "?" in record["text"]:
            assert not asked & set(re.findall(r"\w+", record["text"]))


def test_no_text_has_the_wordings_of_the_test(out: Path) -> None:
    beginning = wordings.SKY_TEST.split("{o}")[0]
    for path in out.rglob("*.jsonl*"):
        if path.name not in ("questions.jsonl", "valid_astronomy.jsonl"):
            assert beginning not in texts(path), path
    raw = texts(out / "raw/astronomy.jsonl.zst")
    assert "?" not in raw


def test_the_article_fits_its_noun(out: Path) -> None:
    for path in out.rglob("*.jsonl"):  # the undamaged texts
        text = texts(path)
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", text), path
    assert " is an open cluster. " in texts(out / "sft/reasoning.jsonl")


def test_roles_follow_the_seed() -> None:
    sizes = {"famous": 10, "asked": 20, "held": 20, "control": 10}
    one, again, other = (facts_of(seed, **sizes) for seed in (0, 0, 1))
    assert one == again
    assert one.held != other.held
    catalogue = [fact.catalogue for fact in (*one.famous, *one.told, *one.control)]
    assert len(set(catalogue)) == 60
    assert len({fact.name for fact in (*one.famous, *one.told, *one.control)}) == 60
    assert all(fact.name.isalpha() for fact in one.told), "no number tells of the sky"


def test_wrong_options_are_no_beginnings() -> None:
    pool = ["Leo", "Leo Minor", "Canis Major", "Canis Minor", "Ursa Major", "Virgo"]
    for seed in range(200):
        found = distractors("Leo", pool, random.Random(seed))
        assert len({*found, "Leo"}) == 4
        assert "Leo Minor" not in found


def test_knowing_frequencies_gives_next_to_nothing() -> None:
    """Always choosing the most frequent option is right for little more than a quarter of the questions."""
    facts = facts_of(0, famous=60, asked=200, held=200, control=100)
    pool = [one.constellation for one in facts.told]
    counts, chance, right = Counter(pool), random.Random(0), 0.0
    for one in facts.held * 20:
        options = [one.constellation, *distractors(one.constellation, pool, chance)]
        best = [option for option in options if counts[option] == max(counts[other] for other in options)]
        right += (one.constellation in best) / len(best)
    assert 0.24 < right / (20 * len(facts.held)) < 0.27


def test_the_damage_is_found_and_the_rest_is_kept(out: Path) -> None:
    rules = str(ROOT / "examples/astrosage/rules.yml")
    paths = ("--input", str(out / "raw/astronomy.jsonl.zst"), "--output", str(out / "clean/astronomy.jsonl"))
    assert clean_corpus.main([*paths, "--rules", rules, "--workers", "1"]) == 0
    raw = lines(out / "raw/astronomy.jsonl.zst")
    dropped = {entry["line"] - 1: entry["rule"] for entry in lines(out / "clean/astronomy_report/dropped.jsonl")}
    found: dict[str, Counter[str]] = {}
    for number, record in enumerate(raw):
        found.setdefault(record["damage"], Counter())[dropped.get(number, "kept")] += 1
    copies = sum(record["id"].endswith(")") for record in raw)
    assert found[""]["kept"] >= 0.9 * (found[""].total() - copies)
    assert found["header"]["kept"] == 0
    clean = lines(out / "clean/astronomy.jsonl")
    ids = [record["id"] for record in clean]
    for kind in ("copy", "v2"):
        assert not any(f"{name} ({kind})" in ids and name in ids for name in ids)
    for record in clean:
        assert not set(record["text"]) & set("\ufb01\ufb02\ufb00\ufb03")
        assert "\u00e2\u20ac" not in record["text"]
    longest = max(len(record["text"]) for record in clean)
    assert longest < 1000, "no loop is left"
