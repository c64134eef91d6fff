"""Parquet shards with encoded pictures in a column, the form of data sets on Hugging Face."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed import DataError
from tools.datasets.imaging.decode import ImageBlock
from tools.datasets.imaging.sources import ID, id_column, reading


@dataclass
class ParquetShard:
    """A Parquet file: `column` holds the bytes of a picture, alone or as `bytes` of a struct.

    The other columns of numbers, strings and booleans are properties; column `ids` becomes `id`.
    """

    path: Path
    column: str
    ids: str | None

    @property
    def files(self) -> list[Path]:
        return [self.path]

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        import pyarrow.parquet

        with reading(self.path, "Parquet file"), pyarrow.parquet.ParquetFile(self.path) as file:
            yield file

    def _check(self, schema: Any) -> None:
        import pyarrow

        if self.column not in schema.names:
            raise DataError(
                f"{self.path}: no column {self.column}; give --image-column, one of {', '.join(schema.names)}"
            )
        kind = schema.field(self.column).type
        if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
            raise DataError(
                f"{self.path}: column {self.column} is {kind}; expected the bytes of pictures, alone or as `bytes` of "
                f"a struct"
            )
        if self.ids is not None and self.ids not in schema.names:
            raise DataError(f"{self.path}: no column {self.ids}, which --id-column names")

    def blocks(self, number: int, size: int) -> Iterator[ImageBlock]:
        with self._open() as file:
            self._check(file.schema_arrow)
            row = 0
            for batch in file.iter_batches(batch_size=size, columns=[self.column]):
                cells = batch.column(0).to_pylist()
                pictures = [cell.get("bytes") if isinstance(cell, dict) else cell for cell in cells]
                names = [f"{self.path}:{row + place}" for place in range(len(pictures))]
                yield ImageBlock(number, row, names, [picture or b"" for picture in pictures])
                row += len(pictures)

    def properties(self, rows: NDArray[np.int64]) -> Any:
        import pyarrow

        with self._open() as file:
            schema = file.schema_arrow
            names = [field.name for field in schema if field.name != self.column and _is_scalar(field.type)]
            if len(rows) == 0:
                table = schema.empty_table().select(names)
            else:
                table = file.read(columns=names).take(pyarrow.array(rows))
            chosen = self.ids or (ID if ID in names else None)
            if chosen is None:
                ids = id_column(f"{self.path.name}:{row}" for row in rows.tolist())
            else:
                ids = id_column(map(str, table.column(chosen).to_pylist()))
                table = table.drop_columns([chosen])
        return table.add_column(0, ID, ids)


def _is_scalar(kind: Any) -> bool:
    import pyarrow.types as types

    tests = (types.is_integer, types.is_floating, types.is_string, types.is_large_string, types.is_boolean)
    return any(test(kind) for test in tests)
