"""Writes the properties of the images that were kept as Parquet: one row per image, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed import DataError
from tools.datasets.imaging.joining import PropertyTable
from tools.datasets.imaging.sources import ImageSourceFiles

ROWS = 1 << 16  # rows held in memory at once


def write_properties(
    path: Path, sources: Sequence[ImageSourceFiles], rows_file: Path, table: PropertyTable | None = None
) -> None:
    """Write the table. `rows_file` holds (source, row) of every image as int64; `table` adds its columns by id.

    Raises DataError if columns contradict each other.
    """
    import pyarrow
    import pyarrow.parquet

    kept: NDArray[np.int64] = np.memmap(rows_file, np.int64, "r").reshape(-1, 2)
    used = np.unique(kept[:, 0]).tolist()
    empty = np.empty(0, np.int64)

    def properties_of(number: int, rows: NDArray[np.int64]) -> Any:
        found = sources[number].properties(rows)
        return found if table is None else table.joined(found)

    schemas = {number: properties_of(number, empty).schema for number in used}
    try:
        schema = pyarrow.unify_schemas(list(schemas.values()))
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise DataError(f"the properties of the inputs do not match: {error}") from error
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for number in used:
            rows = np.array(kept[kept[:, 0] == number, 1])
            for start in range(0, len(rows), ROWS):
                writer.write_table(_filled(properties_of(number, rows[start : start + ROWS]), schema))


def _filled(table: Any, schema: Any) -> Any:
    """`table` with all columns of the schema, empty where it has none."""
    import pyarrow

    missing = {
        field.name: pyarrow.nulls(len(table), field.type) for field in schema if field.name not in table.schema.names
    }
    for name, values in missing.items():
        table = table.append_column(name, values)
    return table.select(schema.names)
