"""Vectors with their ids, as written by embed.py or any other program."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.probe.errors import ProbeError


@dataclass(frozen=True)
class Features:
    """`values` [items, layers, width], memory-mapped from an .npy; `layers` holds the layer numbers."""

    path: Path
    ids: list[str]
    layers: tuple[int, ...]
    values: np.ndarray

    def layer(self, number: int, rows: np.ndarray | None = None) -> np.ndarray:
        """Vectors [items, width] of one layer, or of some of its rows, in float64."""
        part = self.values[:, self.layers.index(number)]
        return np.asarray(part if rows is None else part[rows], dtype=np.float64)

    def rows_of(self, ids: Sequence[str]) -> np.ndarray:
        """Row numbers of these ids. Raises ProbeError if one is missing."""
        places = {name: row for row, name in enumerate(self.ids)}
        missing = [name for name in ids if name not in places]
        if missing:
            raise ProbeError(f"{self.path} has no vector of {len(missing)} of {len(ids)} ids, such as {missing[0]}")
        return np.array([places[name] for name in ids], dtype=np.int64)


def read_features(path: Path) -> Features:
    """Read `X.npy` with `X.ids.jsonl` (and `X.report.json` for the layer numbers) next to it, or embed.py's Parquet.

    Raises ProbeError for files that do not match, repeated ids and values that are not finite.
    """
    try:
        found = _parquet(path) if path.suffix == ".parquet" else _npy(path)
    except OSError as error:
        raise ProbeError(f"{error.filename or path}: {error.strerror or error}") from None
    if len(set(found.ids)) < len(found.ids):
        raise ProbeError(f"{path}: {len(found.ids) - len(set(found.ids))} vectors repeat an id")
    for start in range(0, len(found.values), 4096):  # in pieces, because the file is memory-mapped
        if not np.isfinite(found.values[start : start + 4096]).all():
            raise ProbeError(f"{path} has values that are not finite")
    return found


def _npy(path: Path) -> Features:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ProbeError(f"{path} is not a numeric .npy: {error}") from None
    ids_path, report_path = path.with_suffix(".ids.jsonl"), path.with_suffix(".report.json")
    try:
        ids = [str(json.loads(line)["id"]) for line in ids_path.open(encoding="utf-8")]
        report = json.loads(report_path.read_text()) if report_path.exists() else {}
    except (ValueError, KeyError, TypeError):
        raise ProbeError(f'{ids_path}: expected a line {{"id": ...}} for each row of {path}') from None
    if values.ndim < 2 or len(values) != len(ids):
        raise ProbeError(f"{path} has shape {values.shape}, {ids_path} {len(ids)} ids; expected one row per id")
    layers = tuple(report.get("layers", ()))
    if len(layers) > 1:
        return Features(path, ids, layers, values)
    return Features(path, ids, layers or (0,), values.reshape(len(ids), 1, -1))


def _parquet(path: Path) -> Features:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise ProbeError(f"{path} is not a Parquet file: {error}") from None
    names = [name for name in table.column_names if name.startswith("layer_")]
    if "id" not in table.column_names or not names:
        raise ProbeError(f"{path}: expected the columns id and layer_N that embed.py writes")
    columns = [np.stack(table[name].to_numpy()) for name in names]
    layers = tuple(int(name.removeprefix("layer_")) for name in names)
    return Features(path, [str(one) for one in table["id"].to_pylist()], layers, np.stack(columns, axis=1))
