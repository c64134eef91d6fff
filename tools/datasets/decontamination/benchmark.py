"""Reading the questions of a benchmark from its files."""

from __future__ import annotations

import csv
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.common.errors import UserError
from megatron.evaluation.multiple_choice.items import csv_rows
from tools.datasets.decontamination.overlap import BenchmarkQuestion
from tools.datasets.encoding.records import RecordError, find_inputs, read_record

QUESTION_FIELDS = ("question", "prompt", "input")
OPTION_FIELDS = ("options", "choices")
NAME_FIELDS = ("id", "name", "question_id")


class BenchmarkError(UserError, ValueError):
    """A benchmark whose questions cannot be read; the message names the record."""


def read_benchmark(inputs: Sequence[str]) -> list[BenchmarkQuestion]:
    """Questions from JSON lines, JSON, Parquet (one per record, as in the data tools) or CSV with a header.

    A record has its question in `question`, `prompt` or `input`, and its options as a list or an object in `options` or
    `choices`, or as fields `A`, `B`, ...; an open-ended question has none. BenchmarkError names a record without a
    question.
    """
    questions = []
    for where, record in _records(inputs):
        questions.append(_question(where, record))
    names = [question.name for question in questions]
    if len(set(names)) != len(names):  # names from several files, or not unique
        questions = [
            BenchmarkQuestion(f"{number}: {q.name}", q.question, q.options) for number, q in enumerate(questions, 1)
        ]
    if not questions:
        raise BenchmarkError(f"{', '.join(inputs)}: no questions")
    return questions


def _records(inputs: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(location for messages, record) of every record."""
    others = []
    for entry in inputs:
        path = Path(entry).expanduser()
        if path.suffix != ".csv":
            others.append(entry)
            continue
        try:
            for number, row in enumerate(csv_rows(path), 1):
                yield f"{path}, row {number}", row
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise BenchmarkError(f"{path} cannot be read as CSV in UTF-8: {error}") from None
    if not others:
        return
    for block in find_inputs(others).blocks(None, None):
        for position in range(len(block)):
            try:
                record = read_record(block, position)
            except RecordError as error:
                raise BenchmarkError(f"{block.where(position)}: {error}") from None
            if record is not None:
                yield block.where(position), record


def _question(where: str, record: Mapping[str, Any]) -> BenchmarkQuestion:
    text = next((record[field] for field in QUESTION_FIELDS if isinstance(record.get(field), str)), None)
    if text is None or not text.strip():
        raise BenchmarkError(
            f"{where}: no question; expected text in one of {', '.join(QUESTION_FIELDS)}, the fields are "
            f"{', '.join(map(str, list(record)[:8])) or 'none'}"
        )
    name = next((str(record[field]) for field in NAME_FIELDS if record.get(field) not in (None, "")), where)
    return BenchmarkQuestion(name, text, _options(where, record))


def _options(where: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    given = next((record[field] for field in OPTION_FIELDS if record.get(field)), None)
    if isinstance(given, str):
        try:
            given = json.loads(given)  # a column of CSV
        except ValueError:
            given = [given]
    if given is None:
        given = {letter: record[letter] for letter in string.ascii_uppercase if record.get(letter)}
    options = list(given.values()) if isinstance(given, dict) else given
    if not isinstance(options, list) or not all(isinstance(option, (str, int, float)) for option in options):
        raise BenchmarkError(f"{where}: expected options as a list or an object of texts, got {given!r:.80}")
    return tuple(map(str, options))
