"""Reads questions and options from JSONL, CSV or Parquet; unusable rows are named before anything runs.

AstroMLab-1's format has the columns question, A, B, C, D, and answer unless it is withheld. The options may also be one
column with a list. The answer is a letter, an index from 0, or the option's text.
"""

from __future__ import annotations

import csv
import json
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.common.errors import UserError, first_problems
from megatron.neox_arguments.keys.evaluation import McqKeys

LETTERS = string.ascii_uppercase
_PROBLEMS_SHOWN = 5


class ItemError(UserError, ValueError):
    """A file of questions that cannot be used; the message names the rows."""


@dataclass(frozen=True)
class Item:
    """One question. `answer` is the index of the right option, None if it is withheld."""

    number: int
    question: str
    options: tuple[str, ...]
    answer: int | None
    topic: str | None = None

    @property
    def letters(self) -> str:
        return LETTERS[: len(self.options)]


def read_items(path: str | Path, keys: McqKeys) -> list[Item]:
    """Read all items of a file, numbered from 0. Raises ItemError if any row is not a question with options."""
    rows = _rows(Path(path))
    if not rows:
        raise ItemError(f"{path} has no questions")
    items, problems = [], []
    for number, row in enumerate(rows):
        try:
            items.append(_item(number, row, keys))
        except ItemError as error:
            problems.append(f"row {number}: {error}")
    if problems:
        shown = first_problems(problems, _PROBLEMS_SHOWN)
        raise ItemError(f"{path}: {len(problems)} of {len(rows)} rows cannot be used: {shown}")
    known = sum(item.answer is not None for item in items)
    if known not in (0, len(items)):
        missing = next(item.number for item in items if item.answer is None)
        raise ItemError(
            f"{path}: {known} of {len(items)} rows have an answer, row {missing} has none; give all of them an answer, "
            f"or none for a set whose answers are withheld"
        )
    return items


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".jsonl":
            return list(_json_lines(path))
        if path.suffix == ".csv":
            return csv_rows(path)
        if path.suffix == ".parquet":
            return _parquet(path)
    except OSError as error:
        raise ItemError(f"{path}: {error.strerror or error}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise ItemError(f"{path} cannot be read: {error}") from None
    raise ItemError(f"{path}: expected a file that ends in .jsonl, .csv or .parquet")


def _json_lines(path: Path) -> Iterable[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ItemError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ItemError(f"{path}, line {number}: expected an object with the question and its options")
            yield row


def csv_rows(path: Path) -> list[dict[str, Any]]:
    """Rows as dicts by the names in the header. Raises ItemError, OSError, csv.Error and UnicodeDecodeError."""
    rows = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        for row in (reader := csv.DictReader(file, strict=True)):
            if None in row:
                raise ItemError(
                    f"{path}, line {reader.line_num}: more cells than the header has names; quote the commas"
                )
            rows.append(dict(row))
    return rows


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ItemError(f"{path}: Parquet needs pyarrow; pip install .[eval], or give JSONL or CSV") from None
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ItemError(f"{path} is not a Parquet file: {error}") from None


def _item(number: int, row: dict[str, Any], keys: McqKeys) -> Item:
    question = _text(row, keys.question_field)
    options = _options(row, keys.option_fields)
    given = row.get(keys.answer_field)
    answer = None if given is None or given == "" else _index(given, options, keys.answer_field)
    topic = None if keys.topic_field is None else _text(row, keys.topic_field)
    return Item(number, question, options, answer, topic)


def _options(row: dict[str, Any], fields: Sequence[str]) -> tuple[str, ...]:
    if len(fields) == 1:
        listed = row.get(fields[0])
        if not isinstance(listed, list) or not all(isinstance(option, str) for option in listed):
            raise ItemError(f"{fields[0]} is not a list of texts; it has {', '.join(map(str, row))}")
        options = tuple(listed)
    else:
        options = tuple(_text(row, name) for name in fields)
    if not 2 <= len(options) <= len(LETTERS):
        raise ItemError(f"{len(options)} options; expected 2 to {len(LETTERS)}")
    if len(set(options)) < len(options):
        raise ItemError("two options are the same")
    if not all(option.strip() for option in options):
        raise ItemError("an option is empty")
    return options


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ItemError(f"no text in {name}; the columns are {', '.join(map(str, row))}")
    return value


def _index(given: Any, options: tuple[str, ...], name: str) -> int:
    letters = LETTERS[: len(options)]
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(options):
        return given
    if isinstance(given, str):
        word = given.strip()
        if len(word) == 1 and word.upper() in letters:
            return letters.index(word.upper())
        if word.isdigit() and int(word) < len(options):
            return int(word)
        if given in options:
            return options.index(given)
    raise ItemError(f"{name} {given!r} is not one of {letters}, an index below {len(options)} or the text of an option")
