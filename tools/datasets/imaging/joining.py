"""Joins properties from a separate table to the images by their ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.data.indexed import DataError
from tools.datasets.imaging.sources import ID


class PropertyTable:
    """A Parquet or CSV file with one row per id; it is held in memory."""

    def __init__(self, path: Path, ids: str) -> None:
        import pyarrow
        import pyarrow.csv
        import pyarrow.parquet

        try:
            table = pyarrow.csv.read_csv(path) if path.suffix == ".csv" else pyarrow.parquet.read_table(path)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise DataError(f"--properties {path}: no readable Parquet or CSV file: {error}") from error
        if ids not in table.column_names:
            raise DataError(
                f"--properties {path}: no column {ids}; give --id-column, one of {', '.join(table.column_names)}"
            )
        names = [str(value) for value in table.column(ids).to_pylist()]
        self.path, self._rows = path, {name: row for row, name in enumerate(names)}
        if len(self._rows) < len(names):
            raise DataError(f"--properties {path}: {len(names) - len(self._rows)} rows repeat the {ids} of another")
        self._table = table.drop_columns([ids])
        self.missing = 0

    def joined(self, table: Any) -> Any:
        """`table` with the columns of this one added; ids that are not in it get empty values, and are counted."""
        import pyarrow

        rows = [self._rows.get(name) for name in table.column(ID).to_pylist()]
        self.missing += rows.count(None)
        found = self._table.take(pyarrow.array(rows, pyarrow.int64()))
        for name in found.column_names:
            if name in table.column_names:
                raise DataError(f"--properties {self.path}: the images have a property {name} already")
            table = table.append_column(name, found.column(name))
        return table
