"""Text files for the data tools: good ones, and each kind of bad line and bad file with its error message."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import zstandard

BAD_LINES = {
    b'{"text": "a"': "line 3: not JSON",
    b'{"text": "\xff\xfe"}': "line 3: not UTF-8",
    b'"text"': "line 3: expected a JSON object, got str",
    b'{"body": "a"}': "line 3: no field 'text'; the fields are body",
    b'{"text": ["a"]}': "line 3: field 'text' is not text but list",
    b"[" * 100_000: "line 3: not JSON",
}
BAD_FILES = {
    "empty": "the file is empty",
    "truncated gzip": "cannot be read",
    "truncated zstd": "truncated",
    "damaged zstd": "damaged zstandard",
    "no column": "no column text; the columns are id",
    "damaged parquet": "damaged Parquet",
    "latin-1": "not UTF-8 text",
    "unknown ending": "unknown file type",
    "no text at all": "no documents with text",
    "absent": "no such file",
}


def write_records(path: Path, records: Sequence[Any]) -> Path:
    """Write records as JSON lines; returns the path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_texts(path: Path, texts: Sequence[str]) -> Path:
    """Write texts as JSON lines with the field `text`; returns the path."""
    return write_records(path, [{"text": text} for text in texts])


def write_bad_file(kind: str, folder: Path) -> Path:
    """Write a file of a kind in `BAD_FILES` to an empty folder; returns its path."""
    line = b'{"text": "some words and more words"}\n' * 1000
    if kind == "empty":
        (folder / "in.jsonl").write_bytes(b"")
    elif kind == "truncated gzip":
        (folder / "in.jsonl.gz").write_bytes(gzip.compress(line)[:-20])
    elif kind == "truncated zstd":
        (folder / "in.jsonl.zst").write_bytes(zstandard.compress(line)[:-5])
    elif kind == "damaged zstd":
        (folder / "in.jsonl.zst").write_bytes(b"not zstd at all")
    elif kind == "no column":
        pyarrow.parquet.write_table(pyarrow.table({"id": [1]}), folder / "in.parquet")
    elif kind == "damaged parquet":
        (folder / "in.parquet").write_bytes(b"PAR1 nothing")
    elif kind == "latin-1":
        (folder / "in.txt").write_bytes("Ångström".encode("latin-1"))
    elif kind == "unknown ending":
        (folder / "in.pdf").write_bytes(b"x")
    elif kind == "no text at all":
        (folder / "in.jsonl").write_bytes(b'{"text": ""}\n\n')
    else:
        return folder / "absent.jsonl"
    return next(folder.iterdir())


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder, by name."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}
