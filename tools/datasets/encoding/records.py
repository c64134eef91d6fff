"""Records of files: JSON lines (plain, .gz, .zst), Parquet and plain text, in blocks of about a MiB.

A block is what one worker handles at a time. The cut into blocks depends on the files alone, never on the number of
workers, so the output does not either.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import IO, Any

BLOCK_BYTES = 1 << 20
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".txt", ".parquet")
_PARQUET_ROWS = 512


class SourceError(ValueError):
    """An input that cannot be read; the message names the file."""


@dataclass(frozen=True)
class Block:
    """Consecutive records of one file: JSON lines, or whole values by key where the format is not lines."""

    source: str
    first: int  # number of the first record in its file, counted from 1
    unit: str  # what a record is in messages
    lines: list[bytes] | None = None
    records: list[Any] | None = None

    def __len__(self) -> int:
        return len(self.lines if self.lines is not None else self.records or ())

    def where(self, position: int) -> str:
        """Name of one record for messages."""
        return f"{self.source}, {self.unit} {self.first + position}"


def expand(inputs: Sequence[str]) -> list[Path]:
    """Files behind commas, globs and folders, sorted within each. Raises SourceError for one that matches nothing."""
    files: list[Path] = []
    for entry in (part for item in inputs for part in item.split(",") if part):
        path = Path(entry)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(p) for p in glob(entry, recursive=True) if Path(p).is_file())
        if not found:
            raise SourceError(f"--input {entry}: no such file; a folder or glob must hold one of {', '.join(SUFFIXES)}")
        files += found
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise SourceError(f"{file}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
        if file.stat().st_size == 0:
            raise SourceError(f"{file}: the file is empty")
    if len(set(files)) != len(files):
        twice = next(f for f in files if files.count(f) > 1)
        raise SourceError(f"{twice}: given twice; its documents would count double")
    return files


def read_blocks(path: Path, keys: Sequence[str] | None) -> Iterator[Block]:
    """All records of a file in order; of Parquet only the columns `keys`, or all of them (None).

    Raises SourceError for damaged compression and foreign Parquet.
    """
    try:
        if path.name.endswith(".parquet"):
            yield from _parquet(path, keys)
        elif path.name.endswith(".txt"):
            yield _whole_text(path, keys or ())
        else:
            yield from _lines(path)
    except (OSError, EOFError) as error:  # gzip: BadGzipFile is an OSError, a truncated stream an EOFError
        raise SourceError(f"{path}: cannot be read: {error}") from error


def read_record(block: Block, position: int) -> dict[str, Any] | None:
    """One record as an object, None for a blank line. Raises ValueError with the reason it cannot be used."""
    record: Any
    if block.lines is None:
        record = (block.records or [])[position]
    else:
        line = block.lines[position]
        if not line.strip():
            return None
        try:
            record = json.loads(line)
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    return record


def text_of(record: dict[str, Any], key: str) -> str:
    """A field that must be there and be text. Raises ValueError."""
    if key not in record:
        raise ValueError(f"no field {key!r}; the fields are {', '.join(list(record)[:8]) or 'none'}")
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f"field {key!r} is not text but {type(value).__name__}")
    return value


def _lines(path: Path) -> Iterator[Block]:
    with path.open("rb") as raw:
        stream = _decompress(path, raw)
        number = 1
        while lines := stream.readlines(BLOCK_BYTES):
            yield Block(str(path), number, "line", lines=lines)
            number += len(lines)


def _decompress(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(raw)  # type: ignore[return-value]
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise SourceError(f"{path}: reading .zst needs the package zstandard (pip install .[data])") from error

        class Reader(io.RawIOBase):
            """zstandard ends silently in the middle of a frame; this says so."""

            def __init__(self) -> None:
                self._chunks = self._read()
                self._rest = b""

            def readable(self) -> bool:
                return True

            def _read(self) -> Iterator[bytes]:
                frame = None
                while data := raw.read(1 << 17):
                    while data:
                        frame = frame or zstandard.ZstdDecompressor().decompressobj()
                        try:
                            yield frame.decompress(data)
                        except zstandard.ZstdError as error:
                            raise SourceError(f"{path}: damaged zstandard data: {error}") from error
                        data = frame.unused_data
                        if frame.eof:
                            frame = None
                if frame is not None:
                    raise SourceError(f"{path}: the zstandard data ends in the middle; the file is truncated")

            def readinto(self, buffer: Any) -> int:
                while not self._rest:
                    try:
                        self._rest = next(self._chunks)
                    except StopIteration:
                        return 0
                part, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
                buffer[: len(part)] = part
                return len(part)

        return io.BufferedReader(Reader(), 1 << 20)
    return raw


def _whole_text(path: Path, keys: Sequence[str]) -> Block:
    """A text file is one document; every key gets it."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 text ({error}); convert it first") from error
    return Block(str(path), 1, "record", records=[dict.fromkeys(keys, text)])


def _parquet(path: Path, keys: Sequence[str] | None) -> Iterator[Block]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise SourceError(f"{path}: reading Parquet needs the package pyarrow (pip install .[data])") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        missing = [key for key in keys or () if key not in file.schema_arrow.names]
        if missing:
            raise SourceError(
                f"{path}: no column {', '.join(missing)}; the columns are {', '.join(file.schema_arrow.names)}"
            )
        number = 1
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=None if keys is None else list(keys)):
            rows = batch.to_pylist()
            yield Block(str(path), number, "row", records=rows)
            number += len(rows)
    except pyarrow.ArrowException as error:
        raise SourceError(f"{path}: damaged Parquet file: {error}") from error
