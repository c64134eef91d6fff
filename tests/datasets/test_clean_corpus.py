"""clean_corpus.py repairs, cuts and drops documents by each rule, and reports it."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import ftfy
import pytest
import zstandard

from tests.support.data_commands import ANY_SHARE, clean, cleaned
from tests.support.text_files import BAD_LINES, file_digests, write_texts
from tests.support.vocabulary import real_texts
from tools.datasets.cleaning.rules import Rules
from tools.datasets.encoding import records

pytestmark = pytest.mark.unit

PROSE = (
    "The surface brightness of the outer disc falls off exponentially, with a scale length that hardly depends on the "
    "filter; beyond four of them the profile breaks, and what little light is left follows a shallower slope. We take "
    "this for an old stellar halo. Deeper images of two more galaxies would settle whether that is common."
)


SMALL_BLOCK = 1 << 14  # bytes; the corpus of the tests is many such blocks


def real_corpus() -> list[str]:
    """Real texts and damaged ones: every kind of rule finds something."""
    texts = real_texts()
    noise = random.Random(0)
    letters = ["".join(noise.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(300)]
    return [
        *texts,
        *texts[:10],
        "short",
        PROSE + " so it goes on and on" * 60,
        "\n".join(f"Mon. Not. R. Astron. Soc. 000\n{line}" for line in texts[30].splitlines() if line.strip()),
        texts[20].replace("Python", "Snake"),
        texts[12].upper(),
        " ".join(letters),
        PROSE.replace("fi", "\ufb01").replace(" - ", " \N{EN DASH} ") + " na\u00c3\u00afve",
    ]


def test_any_number_of_workers_writes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "BLOCK_BYTES", SMALL_BLOCK)
    texts = real_texts()[::3]
    source = write_texts(tmp_path / "in.jsonl", [*texts, *real_corpus()[-9:]] * 3)
    assert source.stat().st_size > 12 * SMALL_BLOCK
    results = []
    for workers in (1, 3):
        out = tmp_path / f"w{workers}"
        assert clean(out / "c.jsonl.zst", source, workers=workers) == 0
        summary = json.loads((out / "c_report/summary.json").read_text())
        page = (out / "c_report/page.html").read_text().replace(str(out), "")
        results.append((file_digests(out / "c_report")["dropped.jsonl"], (out / "c.jsonl.zst").read_bytes(), page))
        assert summary.pop("output") == str(out / "c.jsonl.zst")
        assert summary["dropped"]["exact_duplicate"] > 2 * len(texts)
    assert results[0] == results[1]


def test_dropped_documents_are_listed_with_their_rule(tmp_path: Path) -> None:
    corpus = real_corpus()
    kept, dropped = cleaned(tmp_path, *corpus)
    lines = [entry["line"] for entry in dropped]
    assert len(kept) + len(dropped) == len(corpus)
    assert lines == sorted(set(lines))
    texts = [ftfy.fix_text(text).strip() for number, text in enumerate(corpus, start=1) if number not in lines]
    assert [a == b for a, b in zip(kept, texts, strict=True)].count(False) <= 1, "one text has loops"
    limits = Rules()
    for entry in dropped:
        limit = getattr(limits, entry["rule"])
        assert entry["limit"] == limit
        if entry["rule"].startswith("max_"):
            assert entry["value"] > limit
        elif entry["rule"] == "min_characters":
            assert entry["value"] < limit
        else:
            assert entry["value"] >= limit
            assert entry["like"] in [
                f"{tmp_path}/in.jsonl, line {n}" for n in range(1, entry["line"]) if n not in lines
            ]
    summary = json.loads((tmp_path / "out_report/summary.json").read_text())
    assert summary["dropped"] == dict(Counter(entry["rule"] for entry in dropped))
    assert (summary["documents"], summary["kept"]) == (len(corpus), len(kept))
    assert summary["kept_characters"] == sum(map(len, kept))
    assert summary["characters"] == sum(map(len, corpus))
    assert {"exact_duplicate", "near_duplicate", "min_characters", "max_loops", "max_duplicate_lines"} <= set(
        summary["dropped"]
    )


def test_unicode_is_repaired_and_other_fields_stay(tmp_path: Path) -> None:
    broken = PROSE + " na\u00c3\u00afve \ufb01t, \u00e2\u20ac\u0153quoted\u00e2\u20ac\x9d\x00\ud800"
    record = {"id": 7, "text": broken, "meta": {"year": 2013}}
    (tmp_path / "in.jsonl").write_text(json.dumps(record) + "\n")
    assert clean(tmp_path / "out.jsonl", tmp_path / "in.jsonl") == 0
    after = json.loads((tmp_path / "out.jsonl").read_text())
    assert after == {**record, "text": PROSE + ' na\u00efve fit, "quoted"\ufffd'}
    assert clean(tmp_path / "out.jsonl", tmp_path / "in.jsonl", no_unicode=True) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["text"] == broken.replace("\ud800", "?")


def test_one_repetition_of_each_loop_is_kept(tmp_path: Path) -> None:
    unit = "of the outer disc of the"
    kept, dropped = cleaned(tmp_path, f"{PROSE} Also {unit}{' ' + unit * 1} end. " + PROSE, **ANY_SHARE)
    assert not dropped
    assert kept[0].count(unit) == 2, "two turns are no loop"
    for turns in (5, 40):
        text = f"{PROSE} We see{(' ' + unit) * turns} halo. {PROSE.upper()}"
        kept, dropped = cleaned(tmp_path, text, **ANY_SHARE)
        assert kept == [f"{PROSE} We see {unit} halo. {PROSE.upper()}"]
    kept, _ = cleaned(tmp_path, PROSE + " " + "0" * 5000 + " then " + "very " * 9 + "old", **ANY_SHARE)
    assert kept == [PROSE + " 0 then " + "very " * 9 + "old"], "a run of letters is a loop, 45 characters are too short"


def test_a_text_that_was_mostly_loops_is_dropped(tmp_path: Path) -> None:
    loop = "the halo of the halo " * 100
    _, dropped = cleaned(tmp_path, PROSE, PROSE.upper() + loop, near_duplicate=0, no_exact_duplicate=True)
    assert [entry["rule"] for entry in dropped] == ["max_loops"]
    share = (len(loop) - len("the halo of the halo ")) / len(PROSE + loop)
    assert dropped[0]["value"] == pytest.approx(share, abs=0.01)


def test_duplicates_keep_the_first_and_name_it(tmp_path: Path) -> None:
    other = real_texts()[3]
    revised = other.replace(" the ", " this ", 3)
    loud = PROSE.upper().replace(".", "!")
    kept, dropped = cleaned(tmp_path, PROSE, other, loud, revised, PROSE + other, **ANY_SHARE)
    assert kept == [PROSE, other.strip(), (PROSE + other).strip()]
    assert [(e["line"], e["rule"], e["like"][-6:]) for e in dropped] == [
        (3, "exact_duplicate", "line 1"),
        (4, "near_duplicate", "line 2"),
    ]
    kept, dropped = cleaned(
        tmp_path, PROSE, loud, revised, other, near_duplicate=0, no_exact_duplicate=True, **ANY_SHARE
    )
    assert len(kept) == 4
    assert not dropped


def test_near_duplicates_are_those_of_the_exact_jaccard_similarity(tmp_path: Path) -> None:
    """Against sets of shingles: MinHash's estimate has a standard deviation of at most 0.045 with 128 permutations."""
    chance = random.Random(3)
    texts = []
    for text in (text for text in real_texts() if len(text.split()) > 150):
        words = text.split()[:300]
        changed = chance.choice([0.002, 0.005, 0.03, 0.3])
        texts += [" ".join(words), " ".join("changed" if chance.random() < changed else word for word in words)]
    _, dropped = cleaned(tmp_path, *texts, no_exact_duplicate=True, **ANY_SHARE)
    gone = {entry["line"] - 1 for entry in dropped}

    def shingles(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    kept: list[set[tuple[str, ...]]] = []
    checked = Counter[str]()
    for number, text in enumerate(texts):
        mine = shingles(text)
        most = max((len(mine & other) / len(mine | other) for other in kept), default=0.0)
        if most > 0.92:
            checked["alike"] += 1
            assert number in gone, most
        if most < 0.65:
            checked["unlike"] += 1
            assert number not in gone, most
        if number not in gone:
            kept.append(mine)
    assert min(checked["alike"], checked["unlike"]) > 10


def test_rules_from_a_file_and_flags_over_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = tmp_path / "rules.yml"
    rules.write_text("min_characters: 1000\nexact_duplicate: false\nnear_duplicate: 0\n")
    source = write_texts(tmp_path / "in.jsonl", [PROSE, PROSE, "x" * 20])
    assert clean(tmp_path / "out.jsonl", source, rules=rules) == 2
    assert "nothing is left: 3 documents" in capsys.readouterr().err
    assert clean(tmp_path / "out.jsonl", source, rules=rules, min_characters=50) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    for text, message in {
        "min_charcters: 3": "unknown rule min_charcters",
        "- 3": "expected lines of `rule: threshold`",
        "{": "not YAML",
        "min_characters: many": "'many' is not a number",
        "exact_duplicate: 1": "1 is not true or false",
        "max_loops: 30": "30 is more than 1",
        "max_loops: -1": "less than 0",
        "near_duplicate: 0.1": "the minimum is 0.3",
        "loop_repeats: 1": "the minimum is 2",
        "max_perplexity: 10": "needs --perplexity-model",
    }.items():
        rules.write_text(text)
        assert clean(tmp_path / "out.jsonl", source, rules=rules) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("line", BAD_LINES, ids=list(BAD_LINES.values()))
def test_bad_records(line: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = json.dumps({"text": PROSE}).encode()
    (tmp_path / "in.jsonl").write_bytes(
        first + b"\n\n" + line + b"\n" + first.upper().replace(b"TEXT", b"text") + b"\n"
    )
    assert clean(tmp_path / "out.jsonl", tmp_path / "in.jsonl") == 2
    assert BAD_LINES[line] in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]
    assert clean(tmp_path / "out.jsonl", tmp_path / "in.jsonl", on_bad_record="skip", no_exact_duplicate=True) == 0
    assert BAD_LINES[line] in capsys.readouterr().err
    listed = [json.loads(entry) for entry in (tmp_path / "out_report/dropped.jsonl").read_text().splitlines()]
    assert [entry["rule"] for entry in listed] == ["unreadable", "near_duplicate"]
    assert BAD_LINES[line] in listed[0]["message"]


def test_a_failed_run_keeps_the_previous_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cleaned(tmp_path, *real_corpus()[-9:])
    before = file_digests(tmp_path), file_digests(tmp_path / "out_report")
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": PROSE}) + "\n{")
    assert clean(tmp_path / "out.jsonl", tmp_path / "bad.jsonl") == 2
    assert clean(tmp_path / "out.txt", tmp_path / "in.jsonl") == 2
    assert clean(tmp_path / "in.jsonl", tmp_path / "in.jsonl") == 2
    assert "this is one of the inputs" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").unlink()
    assert (file_digests(tmp_path), file_digests(tmp_path / "out_report")) == before


def test_a_line_longer_than_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "BLOCK_BYTES", 4096)
    chance = random.Random(1)
    words = ["".join(chance.choices("abcdefghij", k=chance.randint(2, 9))) for _ in range(12_000)]
    long = " ".join(words)
    kept, _ = cleaned(tmp_path, PROSE, long, PROSE + long[:500])
    assert len(long) > 18 * records.BLOCK_BYTES
    assert kept == [PROSE, long, PROSE + long[:500]]


def test_the_page_shows_text_as_text(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script> & " + PROSE
    broken, looping = hostile + " na\u00c3\u00afve <b>", hostile + " \ufb01t. " + "<hr>" * 90
    cleaned(tmp_path, hostile, broken, "<i>short", looping, no_exact_duplicate=True, near_duplicate=0, **ANY_SHARE)
    page = (tmp_path / "out_report/page.html").read_text()
    assert not re.search(r"<(script|b|i|hr)>", page)
    assert "&lt;i&gt;short" in page
    assert "<del>" in page
    shown = set(re.findall(r"<h2 id=(\w+)>", page))
    assert shown == {"unicode", "min_characters", "loops"}


def test_compressed_outputs_hold_the_same(tmp_path: Path) -> None:
    import gzip

    source = write_texts(tmp_path / "in.jsonl", real_corpus()[-19:])
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst"):
        assert clean(tmp_path / name, source, report=tmp_path / "report") == 0
    plain = (tmp_path / "a.jsonl").read_bytes()
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()) == plain
    assert zstandard.ZstdDecompressor().stream_reader((tmp_path / "a.jsonl.zst").read_bytes()).read() == plain
