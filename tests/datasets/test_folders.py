"""Folders: every kind of file is read or reported, bad files can be skipped, and file names are kept."""

import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron.data.header import read_header
from megatron.data.indexed import IndexedFile
from megatron.tokenizer import Tokenizer
from tests.support.conversations import conversations
from tests.support.data_commands import ANY_SHARE, clean, preprocess, preprocess_chats, table_rows
from tests.support.text_files import write_records, write_texts
from tools.datasets.encoding import pipeline, progress
from tools.datasets.encoding import records as reading

pytestmark = pytest.mark.unit

KEEP_ALL = {name: value for name, value in ANY_SHARE.items() if name != "near_duplicate"}
LONG = "A sentence about the structure of a galaxy, number {}, which is not like any other of its kind. "


def texts_of(prefix: Path, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(ids.tolist()) for ids in IndexedFile(prefix)]


def test_every_kind_of_file_is_read_or_named(
    vocab_folder: Path, hf_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()

    def line(text: str) -> bytes:
        return json.dumps({"text": text}).encode() + b"\n"

    (folder / "a.jsonl").write_bytes(line("jsonl"))
    (folder / "b.ndjson").write_bytes(line("ndjson"))
    (folder / "c.ndjson.gz").write_bytes(gzip.compress(line("ndjson gz")))
    (folder / "d.ndjson.zst").write_bytes(zstandard.compress(line("ndjson zst")))
    (folder / "e.json").write_text(json.dumps([{"text": "a list"}, {"text": "of records"}], indent=1))
    (folder / "f.json").write_bytes(line("json lines"))
    (folder / "g.json.gz").write_bytes(gzip.compress(b'\xef\xbb\xbf[{"text": "packed list"}]'))
    (folder / "h.txt.gz").write_bytes(gzip.compress(b"packed text"))
    for name in ("i.csv", "j.md", "k.jsonl.xz"):
        (folder / name).write_bytes(b"x")
    assert preprocess(vocab_folder, tmp_path / "out", folder) == 0
    expected = ["jsonl", "ndjson", "ndjson gz", "ndjson zst", "a list", "of records", "json lines", "packed list"]
    assert texts_of(tmp_path / "out_text_document", hf_tokenizer) == [*expected, "packed text"]
    error = capsys.readouterr().err
    assert f"{folder}: 3 files are ignored" in error
    assert "i.csv, j.md, k.jsonl.xz" in error


def bad_folder(folder: Path) -> list[Path]:
    """A folder with two good files; returns the bad ones."""
    folder.mkdir()
    write_records(folder / "a.jsonl", [{**record, "text": "first"} for record in conversations(3, "stars")])
    bad = [folder / name for name in ("b.jsonl", "c.txt", "d.jsonl.gz", "e.parquet", "f.jsonl.zst", "g.json")]
    bad[0].write_bytes(b"")
    bad[1].write_bytes("Ångström".encode("latin-1"))
    bad[2].write_bytes(b"no gzip")
    bad[3].write_bytes(b"PAR1 nothing")
    bad[4].write_bytes(zstandard.compress(b'{"text": "x"}\n' * 99)[:-5])
    bad[5].write_bytes(b'[{"text": ')
    write_records(folder / "z.jsonl", [{**record, "text": LONG.format(1)} for record in conversations(3, "dust")])
    return bad


def test_all_bad_files_are_named_at_once(
    vocab_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = bad_folder(tmp_path / "in")
    runs = {
        "preprocess_data.py": lambda: preprocess(vocab_folder, tmp_path / "o", tmp_path / "in"),
        "preprocess_sft.py": lambda: preprocess_chats(vocab_folder, tmp_path / "o", f"a={tmp_path / 'in'}"),
        "clean_corpus.py": lambda: clean(tmp_path / "o.jsonl", tmp_path / "in"),
    }
    for name, run in runs.items():
        assert run() == 2
        error = capsys.readouterr().err
        assert error.startswith(f"{name}: 6 of 8 files cannot be read:")
        assert all(str(path) in error for path in bad)
        assert "--on-bad-record skip" in error
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_bad_files_are_left_out_and_listed_at_the_end(
    vocab_folder: Path,
    hf_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = bad_folder(tmp_path / "in")
    late = tmp_path / "in" / "d2.jsonl.gz"  # damaged after the part that is checked first
    monkeypatch.setattr(reading, "BLOCK_BYTES", 1 << 12)
    late.write_bytes(
        gzip.compress(b"".join(b'{"text": "%s"}\n' % os.urandom(500).hex().encode() for _ in range(50)))[:-9]
    )
    assert preprocess(vocab_folder, tmp_path / "o", tmp_path / "in", on_bad_record="skip") == 0
    lines = capsys.readouterr().err.splitlines()
    first = lines.index("7 of 9 files could not be read and were skipped:")
    assert len(lines[first + 1 :]) == 7
    assert all(any(str(path) in line for line in lines[first + 1 :]) for path in [*bad, late])
    texts = texts_of(tmp_path / "o_text_document", hf_tokenizer)
    assert texts[:3] == ["first"] * 3
    assert texts[-3:] == [LONG.format(1)] * 3
    header = read_header(tmp_path / "o_text_document")
    assert header is not None
    assert len(header.bad_files) == 7
    late.unlink()
    assert preprocess_chats(vocab_folder, tmp_path / "s", f"a={tmp_path / 'in'}", on_bad_record="skip") == 0
    out, error = capsys.readouterr()
    assert table_rows(out)["a", "conversations written"] == "6"
    assert error.count("could not be read and were skipped") == 1
    assert clean(tmp_path / "o.jsonl", tmp_path / "in", on_bad_record="skip", min_characters=1) == 0
    assert "6 of 8 files could not be read" in capsys.readouterr().err
    for path in (tmp_path / "in").iterdir():
        if path not in bad:
            path.unlink()
    assert preprocess(vocab_folder, tmp_path / "n", tmp_path / "in", on_bad_record="skip") == 2
    assert "6 of 6 files cannot be read" in capsys.readouterr().err


def test_cleaned_records_keep_their_fields_and_the_name_of_their_file(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "deep"
    folder.mkdir(parents=True)
    write_records(folder / "a.jsonl", [{"text": LONG.format(i) * 3, "id": i} for i in range(2)])
    (folder / "b.txt").write_text(LONG.format(2) * 3)
    table = pyarrow.table({"text": [LONG.format(3) * 3], "year": [1923], "file": ["theirs"]})
    pyarrow.parquet.write_table(table, folder / "c.parquet")
    assert clean(tmp_path / "o.jsonl", tmp_path / "in", loop_repeats=0, near_duplicate=0, **KEEP_ALL) == 0
    records = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [(r["file"], r.get("id"), r.get("year")) for r in records] == [
        ("deep/a.jsonl", 0, None),
        ("deep/a.jsonl", 1, None),
        ("deep/b.txt", None, None),
        ("theirs", None, 1923),
    ]


def test_progress_comes_by_time(
    vocab_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_texts(tmp_path / "in.jsonl", [LONG.format(i) for i in range(50)])
    chats = write_records(tmp_path / "c.jsonl", conversations(50, "stars"))
    for seconds, expected in ((progress.SECONDS, 0), (0.0, 3)):
        monkeypatch.setattr(progress, "SECONDS", seconds)
        assert preprocess(vocab_folder, tmp_path / "o", source) == 0
        assert preprocess_chats(vocab_folder, tmp_path / "s", f"a={chats}") == 0
        assert clean(tmp_path / "o.jsonl", source, min_characters=1) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "100% of the input" in line]
        assert len(lines) == expected, lines


def test_problems_are_detected_before_the_work_is_done(
    vocab_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A source of duplicates only is dropped from the mix; impossible shares are rejected before anything is read."""
    a = write_records(tmp_path / "a.jsonl", conversations(5, "stars"))
    b = write_records(tmp_path / "b.jsonl", conversations(5, "stars"))
    assert preprocess_chats(vocab_folder, tmp_path / "sft", f"a:0.5={a}", f"b:0.5={b}") == 0
    out, error = capsys.readouterr()
    assert "warning: source b has no conversations left, so it is not in" in error
    assert table_rows(out)["b", "dropped: duplicate"] == "5"
    assert "sft_b" not in (tmp_path / "sft_train.yml").read_text()
    assert not list(tmp_path.glob("sft_b*")) + list(tmp_path.glob("*partial*"))
    monkeypatch.setattr(pipeline, "in_order", lambda *_: pytest.fail("work began"))
    for share in ("0", "-1", "nan"):
        assert preprocess_chats(vocab_folder, tmp_path / "x", f"a:{share}={a}", f"b:0.5={b}") == 2
    (tmp_path / "k.jsonl").write_text('{"a": "one", "b": ""}\n')
    monkeypatch.undo()
    assert preprocess(vocab_folder, tmp_path / "k", tmp_path / "k.jsonl", jsonl_keys=["a", "b"]) == 0
    assert "k_b_document: no documents, nothing written; 1 empty" in capsys.readouterr().err
    assert not list(tmp_path.glob("k_b*"))


def test_fields_that_are_not_used_are_named(
    vocab_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_records(tmp_path / "in.jsonl", [{"text": "x", "url": 1}] * 3 + [{"text": "  ", "url": 1, "id": 2}])
    assert preprocess(vocab_folder, tmp_path / "o", source) == 0
    error = capsys.readouterr().err
    assert "unused fields, and the number of records that have them: url (4), id (1)" in error
    assert "3 documents" in error
    assert "1 empty" in error
    header = read_header(tmp_path / "o_text_document")
    assert header is not None
    assert header.unknown_keys == {"url": 4, "id": 1}
