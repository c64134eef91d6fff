"""Labels of the items, read from a CSV, JSON lines or Parquet table with an id column."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tools.probe.errors import ProbeError

Kind = Literal["ridge", "logistic"]


@dataclass(frozen=True)
class Property:
    """One column of labels: numbers (ridge) or classes (logistic), for the items that have a value."""

    name: str
    kind: Kind
    ids: list[str]
    values: np.ndarray  # float64, or int64 indices into `classes`
    classes: tuple[str, ...] = ()

    def of(self, ids: Sequence[str]) -> tuple[list[str], np.ndarray]:
        """The `ids` that have a value, in the given order, and their values."""
        places = {name: row for row, name in enumerate(self.ids)}
        known = [name for name in ids if name in places]
        return known, self.values[[places[name] for name in known]]


def read_properties(path: Path, targets: Sequence[str], classes: Sequence[str], id_field: str = "id") -> list[Property]:
    """Read the columns `targets` as numbers and `classes` as class names.

    Empty cells, nulls and numbers that are not finite are missing values. Raises ProbeError for missing columns,
    targets that are not numbers, and repeated ids.
    """
    rows = _rows(path)
    if not rows:
        raise ProbeError(f"{path} has no rows")
    missing = [name for name in (id_field, *targets, *classes) if name not in rows[0]]
    if missing:
        raise ProbeError(f"{path}: no column {', '.join(missing)}; it has {', '.join(map(str, rows[0]))}")
    ids = [str(row.get(id_field)) for row in rows]
    if len(set(ids)) < len(ids):
        (name, times), *_ = Counter(ids).most_common(1)
        raise ProbeError(f"{path}: the id {name} appears in {times} rows; expected one row per id")
    numbers = [_numbers(path, name, ids, [row.get(name) for row in rows]) for name in targets]
    names = [_classes(path, name, ids, [row.get(name) for row in rows]) for name in classes]
    return [*numbers, *names]


def _numbers(path: Path, name: str, ids: list[str], cells: Iterable[Any]) -> Property:
    known: list[tuple[str, float]] = []
    for one, cell in zip(ids, cells, strict=True):
        if _missing(cell):
            continue
        try:
            value = float(cell)
        except (TypeError, ValueError):
            raise ProbeError(
                f"{path}: {name} of {one} is {cell!r}, expected a number; for class names use --classes {name}"
            ) from None
        if math.isfinite(value):
            known.append((one, value))
    values = np.array([value for _, value in known])
    if len(known) < 2 or values.std() == 0:
        raise ProbeError(f"{path}: {name} has no two different values among {len(known)}; there is nothing to predict")
    return Property(name, "ridge", [one for one, _ in known], values)


def _classes(path: Path, name: str, ids: list[str], cells: Iterable[Any]) -> Property:
    known = [(one, str(cell)) for one, cell in zip(ids, cells, strict=True) if not _missing(cell)]
    classes = tuple(sorted({cell for _, cell in known}))
    if len(classes) < 2:
        raise ProbeError(f"{path}: {name} has fewer than two classes {classes}; there is nothing to predict")
    number = {one: index for index, one in enumerate(classes)}
    values = np.array([number[cell] for _, cell in known], dtype=np.int64)
    return Property(name, "logistic", [one for one, _ in known], values, classes)


def _missing(cell: Any) -> bool:
    """Whether a cell has no class: NaN is how Parquet writes of data frames mark one that is unknown."""
    return cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell))


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as file:
                return [dict(row) for row in csv.DictReader(file, strict=True)]
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                return [json.loads(line) for line in file if line.strip()]
        if path.suffix == ".parquet":
            import pyarrow.parquet as parquet

            return parquet.read_table(path).to_pylist()
    except OSError as error:
        raise ProbeError(f"{path}: {error.strerror or error}") from None
    except (csv.Error, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise ProbeError(f"{path} cannot be read: {error}") from None
    raise ProbeError(f"{path}: expected a table as .csv, .jsonl or .parquet")
