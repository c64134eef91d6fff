"""Reads the records of a file of texts, one after another. Without torch, so that tools start fast."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.common.errors import UserError

_PARQUET_ROWS = 512


class TextError(UserError, ValueError):
    """A file of texts that cannot be read."""


def read_records(path: Path, columns: list[str]) -> Iterator[tuple[str, Any]]:
    """(location for messages, JSON line or Parquet record) of each record; of Parquet only `columns` are read.

    Raises TextError if the file cannot be read.
    """
    try:
        if path.suffix == ".jsonl":
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield f"{path}, line {number}", line
            return
        if path.suffix == ".parquet":
            yield from _parquet(path, columns)
            return
    except OSError as error:
        raise TextError(f"{path}: {error.strerror or error}") from None
    raise TextError(f"{path}: expected a file that ends in .jsonl or .parquet")


def _parquet(path: Path, columns: list[str]) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise TextError(f"{path}: Parquet needs pyarrow; pip install .[eval], or give JSONL") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            there = [name for name in columns if name in file.schema_arrow.names]
            if columns[0] not in there:
                raise TextError(f"{path}: no column {columns[0]}; it has {', '.join(file.schema_arrow.names)}")
            number = 0
            for batch in file.iter_batches(_PARQUET_ROWS, columns=there):
                for record in batch.to_pylist():
                    yield f"{path}, row {number}", record
                    number += 1
    except pyarrow.ArrowInvalid as error:
        raise TextError(f"{path} is not a Parquet file: {error}") from None
