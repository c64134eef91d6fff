"""The commands of tools/datasets, run in this process with the options that most tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.text_files import write_texts
from tools.datasets import clean_corpus, preprocess_data, preprocess_sft
from tools.datasets.cleaning.rules import Rules

ANY_SHARE = {name: 1 for name in Rules.shares() if name.startswith("max_")}  # flags of `clean`


def preprocess(vocab: Path, out: Path, *inputs: Path | str, workers: int = 1, **options: Any) -> int:
    """Run preprocess_data.py; returns its exit code. `options` are flags with `_` for `-`, True if without a value."""
    arguments = ["--input", *map(str, inputs), "--output-prefix", str(out), "--workers", str(workers)]
    arguments += ["--tokenizer-type", "HFTokenizer", "--vocab-file", str(vocab)]
    return preprocess_data.main(arguments + _flags(options))


def preprocess_chats(vocab: Path, out: Path, *sources: str, workers: int = 1, **options: Any) -> int:
    """Run preprocess_sft.py; returns its exit code. `sources` are NAME[:SHARE]=FILES."""
    arguments = ["--output-prefix", str(out), "--workers", str(workers)]
    arguments += ["--tokenizer-type", "HFTokenizer", "--vocab-file", str(vocab)]
    for source in sources:
        arguments += ["--source", source]
    return preprocess_sft.main(arguments + _flags(options))


def clean(out: Path, *inputs: Path | str, workers: int = 1, **options: Any) -> int:
    """Run clean_corpus.py; returns its exit code."""
    arguments = ["--input", *map(str, inputs), "--output", str(out), "--workers", str(workers)]
    return clean_corpus.main(arguments + _flags(options))


def cleaned(folder: Path, *texts: str, **options: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """Run clean_corpus.py on these texts in `folder`; returns (texts of the output, entries of dropped.jsonl)."""
    source = write_texts(folder / "in.jsonl", list(texts))
    assert clean(folder / "out.jsonl", source, **options) == 0
    kept = [json.loads(line)["text"] for line in (folder / "out.jsonl").read_text().splitlines()]
    return kept, [json.loads(line) for line in (folder / "out_report/dropped.jsonl").read_text().splitlines()]


def _flags(options: dict[str, Any]) -> list[str]:
    words = []
    for name, value in options.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += value if isinstance(value, list) else [str(value)]
    return words


def table_rows(output: str) -> dict[tuple[str, str], str]:
    """The table at the end of preprocess_sft.py and inspect_data.py: (source, quantity) -> number."""
    lines = output.splitlines()
    first = next(number for number, line in enumerate(lines) if line.strip() == "source")
    rows, source = {}, ""
    for line in lines[first + 1 :]:
        if not line.strip():
            break
        if not line.startswith(" "):
            source, line = line.split(maxsplit=1)
        what, _, number = line.strip().rpartition("  ")
        rows[source, what.strip()] = number
    return rows
