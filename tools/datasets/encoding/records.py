"""Records of files: JSON lines, JSON lists, plain text (each plain, .gz or .zst) and Parquet, in blocks of about 1 MiB.

A block is the unit of work of a worker. The division into blocks depends on the files only, never on the number of
workers, and therefore neither does the output.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import IO, Any

from megatron.common.errors import UserError
from tools.datasets.encoding.progress import Progress

BLOCK_BYTES = 1 << 20
_LINES, _LISTS, _TEXT = (".jsonl", ".ndjson"), (".json",), (".txt",)
_PACKED = ("", ".gz", ".zst")
SUFFIXES = (*(kind + packed for kind in (*_LINES, *_LISTS, *_TEXT) for packed in _PACKED), ".parquet")
MAX_NAMED = 20  # files named in full
_PARQUET_ROWS = 512


class SourceError(UserError, ValueError):
    """An input that cannot be read; the message names the file."""


class RecordError(UserError, ValueError):
    """A record that cannot be used; `rule` is the reason in a few words, used for counting."""

    def __init__(self, message: str, rule: str) -> None:
        super().__init__(message)
        self.rule = rule


@dataclass(frozen=True)
class Block:
    """Consecutive records of one file: JSON lines, or whole values by key for other formats."""

    source: str
    first: int  # number of the first record in its file, counted from 1
    unit: str  # name of a record in messages
    lines: list[bytes] | None = None
    records: list[Any] | None = None
    bytes: int = 0  # size of these records in the file
    file: str | None = None  # the file's name relative to the given folder

    def __len__(self) -> int:
        return len(self.lines if self.lines is not None else self.records or ())

    def where(self, position: int) -> str:
        """Name of one record for messages."""
        return f"{self.source}, {self.unit} {self.first + position}"


@dataclass
class InputFiles:
    """The files of a job. With `skip_bad`, unreadable files go into `bad` with the reason, else they are errors."""

    files: list[Path]
    skip_bad: bool = False
    names: dict[Path, str] = field(default_factory=dict)  # relative to the given folder
    bad: dict[Path, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def check(self, keys: Sequence[str] | None) -> None:
        """Open every file and read its beginning (text files completely), so that all problems are reported before work
        begins. SourceError names all files that cannot be read."""
        problems = {}
        for file in self.files:
            reason = _problem(file, keys)
            if reason is not None:
                problems[file] = reason
        if not problems:
            return
        if self.skip_bad and len(problems) < len(self.files):
            self.bad |= problems
            return
        named = list(problems.values())[:MAX_NAMED]
        if len(problems) > 1:
            more = f"\n  and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
            named = [f"{len(problems)} of {len(self.files)} files cannot be read:\n  " + "\n  ".join(named) + more]
        hint = "" if self.skip_bad else " (--on-bad-record skip skips and lists such files)"
        raise SourceError(named[0] + hint)

    def blocks(
        self, keys: Sequence[str] | None, columns: Sequence[str] | None, progress: Progress | None = None
    ) -> Iterator[Block]:
        """All readable records; `keys` are required, and `columns` are read from Parquet (None: all)."""
        for file in self.files:
            if file in self.bad:
                continue
            try:
                for block in read_blocks(file, keys, columns, self.names.get(file)):
                    if progress is not None:
                        progress.read += block.bytes
                    yield block
            except SourceError as error:
                if not self.skip_bad:
                    raise
                self.bad[file] = str(error)

    def describe_bad(self) -> list[str]:
        """Lines that list the skipped files."""
        if not self.bad:
            return []
        return [f"{len(self.bad)} of {len(self.files)} files could not be read and were skipped:"] + [
            f"  {reason}" for reason in self.bad.values()
        ]


def find_inputs(inputs: Sequence[str], skip_bad: bool = False) -> InputFiles:
    """Files matched by comma-separated names, globs and folders, sorted within each; reports unread files of a folder.

    SourceError for an entry that matches nothing.
    """
    found = InputFiles([], skip_bad)
    for entry in (part for item in inputs for part in item.split(",") if part):
        path = Path(os.path.expandvars(entry)).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file())
            files = [p for p in inside if p.name.endswith(SUFFIXES)]
            found.names |= {p: str(p.relative_to(path)) for p in files}
            _name_unread(path, [p for p in inside if p not in found.names])
        elif path.is_file():
            files = [path]
        else:
            files = sorted(Path(p) for p in glob(str(path), recursive=True) if Path(p).is_file())
        if not files:
            raise SourceError(f"--input {entry}: no such file; a folder or glob must hold one of {', '.join(SUFFIXES)}")
        found.files += files
    if not found.files:
        raise SourceError(f"--input {' '.join(inputs)}: does not name a file")
    if len(set(found.files)) != len(found.files):
        twice = next(f for f in found.files if found.files.count(f) > 1)
        raise SourceError(f"{twice}: given twice; its documents would count double")
    return found


def _name_unread(folder: Path, files: list[Path]) -> None:
    if files:
        names = [str(file.relative_to(folder)) for file in files[:MAX_NAMED]]
        more = f" and {len(files) - MAX_NAMED} more" if len(files) > MAX_NAMED else ""
        print(
            f"{folder}: {len(files)} files are ignored, because their suffix is not one of {', '.join(SUFFIXES)}: "
            f"{', '.join(names)}{more}",
            file=sys.stderr,
        )


def _problem(file: Path, keys: Sequence[str] | None) -> str | None:
    """Why a file cannot be read, judging by its beginning; None if it can."""
    if not file.name.endswith(SUFFIXES):
        return f"{file}: unknown file type; expected one of {', '.join(SUFFIXES)}"
    try:
        if file.stat().st_size == 0 or next(read_blocks(file, keys, keys), None) is None:
            return f"{file}: the file is empty"
    except SourceError as error:
        return str(error)
    except OSError as error:
        return f"{file}: {error.strerror}"
    return None


def _kind(path: Path) -> str:
    """The suffix without that of the compression."""
    return Path(path.name.removesuffix(".gz").removesuffix(".zst")).suffix


def read_blocks(
    path: Path, keys: Sequence[str] | None, columns: Sequence[str] | None = None, name: str | None = None
) -> Iterator[Block]:
    """All records of a file in order. Parquet must have the columns `keys`; `columns` are read from it (None: all).

    SourceError for damaged compression or an unsuitable Parquet file.
    """
    try:
        if path.name.endswith(".parquet"):
            yield from _parquet(path, keys, columns, name)
        elif _kind(path) in _TEXT:
            yield _whole_text(path, keys or (), name)
        else:
            yield from _json(path, name)
    except (OSError, EOFError, zlib.error) as error:
        # gzip: BadGzipFile is an OSError, a truncated stream an EOFError, damage inside a zlib.error
        raise SourceError(f"{path}: cannot be read: {error}") from error


def read_record(block: Block, position: int) -> dict[str, Any] | None:
    """One record as an object, None for a blank line. RecordError states why it cannot be used."""
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
            raise RecordError(f"not UTF-8: {error.reason} at byte {error.start}", "not UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise RecordError(f"not JSON: {error}", "not JSON") from None
    if not isinstance(record, dict):
        raise RecordError(f"expected a JSON object, got {type(record).__name__}", "not an object")
    return record


def text_of(record: dict[str, Any], key: str) -> str:
    """A required text field. RecordError if it is missing or not text."""
    if key not in record:
        fields = ", ".join(list(record)[:8]) or "none"
        raise RecordError(f"no field {key!r}; the fields are {fields}", f"no field {key}")
    value = record[key]
    if not isinstance(value, str):
        raise RecordError(f"field {key!r} is not text but {type(value).__name__}", f"field {key} is not text")
    return value


def _json(path: Path, name: str | None) -> Iterator[Block]:
    """JSON lines, or a single JSON list of records, a common format of conversation datasets."""
    with path.open("rb") as raw:
        stream = _decompress(path, raw)
        number, read = 1, 0
        while lines := stream.readlines(BLOCK_BYTES):
            if number == 1 and _kind(path) in _LISTS and _begins_a_list(lines):
                records = _list(path, b"".join(lines) + stream.read())
                yield from _in_blocks(path, records, name)
                return
            place = raw.tell()
            yield Block(str(path), number, "line", lines=lines, bytes=place - read, file=name)
            read, number = place, number + len(lines)


def _begins_a_list(lines: list[bytes]) -> bool:
    first = next((line.strip() for line in lines if line.strip()), b"")
    return first.removeprefix(b"\xef\xbb\xbf").startswith(b"[")


def _list(path: Path, content: bytes) -> list[Any]:
    try:
        records = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: begins like a JSON list but is not valid JSON: {error}") from None
    return records if isinstance(records, list) else [records]


def _in_blocks(path: Path, records: list[Any], name: str | None) -> Iterator[Block]:
    size = path.stat().st_size
    for start in range(0, len(records), _PARQUET_ROWS):
        part = records[start : start + _PARQUET_ROWS]
        yield Block(
            str(path), start + 1, "record", records=part, bytes=size * len(part) // max(len(records), 1), file=name
        )


def _decompress(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(raw)  # type: ignore[return-value]
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise SourceError(f"{path}: reading .zst needs the package zstandard (pip install .[data])") from error

        class Reader(io.RawIOBase):
            """Reports a file that ends in the middle of a frame, which zstandard ignores."""

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


def _whole_text(path: Path, keys: Sequence[str], name: str | None) -> Block:
    """A text file as one document, available under every key; `file` is its origin."""
    with path.open("rb") as raw:
        content = _decompress(path, raw).read()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 text ({error}); convert it first") from error
    record = {"file": name or path.name, **dict.fromkeys(keys, text)}
    return Block(str(path), 1, "record", records=[record], bytes=path.stat().st_size, file=name)


def _parquet(
    path: Path, keys: Sequence[str] | None, columns: Sequence[str] | None, name: str | None
) -> Iterator[Block]:
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
        number, size = 1, path.stat().st_size
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=None if columns is None else list(columns)):
            rows = batch.to_pylist()
            part = size * len(rows) // max(file.metadata.num_rows, 1)
            yield Block(str(path), number, "row", records=rows, bytes=part, file=name)
            number += len(rows)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: damaged Parquet file: {error}") from error
