"""The growing file of vectors: a run killed at any moment resumes from the end of the last complete window.

    vectors.npy.partial             an .npy file with space for its header, then rows of fixed size
    vectors.npy.partial.ids.jsonl   a line per row
    vectors.npy.partial.json        the journal: identity of the job, and progress

The journal is replaced after rows and ids have been synced; anything beyond it is written again. At the end the ids and
the report get their final names first, and the vectors last: a file of vectors is either complete or absent.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron.common.atomic_files import replacing, sync_file, sync_folder, write_text
from megatron.common.errors import UserError

_COPIED_BYTES = 1 << 24  # bytes copied to Parquet at a time


@dataclass
class WrittenSoFar:
    """Progress of a file of vectors; `named` are the first records that were left out."""

    records: int = 0
    rows: int = 0
    cut: int = 0
    tokens: int = 0
    seconds: float = 0.0
    ids_bytes: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    named: list[str] = field(default_factory=list)


class VectorFile:
    """fp32 rows [h], or [layers, h] for several layers, each with an id. `identity` is what all rows share: a partial
    file with a different one is refused."""

    def __init__(self, path: Path, layers: Sequence[int], hidden_size: int, identity: dict[str, Any]) -> None:
        """Start or resume a file. Raises UserError if it is already complete, or belongs to a different job."""
        self.path, self.layers, self.identity = path, tuple(layers), identity
        self._row_shape = (hidden_size,) if len(self.layers) == 1 else (len(self.layers), hidden_size)
        self._row_bytes = 4 * len(self.layers) * hidden_size
        self.partial = path.with_name(path.name + ".partial")
        self._ids = path.with_name(path.name + ".partial.ids.jsonl")
        self._journal = path.with_name(path.name + ".partial.json")
        if path.exists():
            raise UserError(f"embed.output {path} already exists and is complete; remove it, or give another name")
        self.progress = self._read_journal()
        self._rows_file: BinaryIO | None = None  # opened for the first row

    def _open(self) -> BinaryIO:
        """Open the files of rows and ids, truncated to the length in the journal; returns the file of rows."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows = self.partial.open("r+b" if self.partial.exists() else "w+b")
            rows.truncate(len(self._header(0)) + self.progress.rows * self._row_bytes)
            self._id_file = self._ids.open("ab")
            self._id_file.truncate(self.progress.ids_bytes)
        except OSError as error:
            raise UserError(f"embed.output {self.path}: {error.strerror}") from None
        return rows

    def _read_journal(self) -> WrittenSoFar:
        if not self._journal.exists():
            return WrittenSoFar()
        try:
            content = json.loads(self._journal.read_text())
            before, progress = content["identity"], WrittenSoFar(**content["progress"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self._journal} is damaged; remove it and {self.partial} to start over") from None
        other = [
            f"{name} was {before.get(name)}, now {self.identity.get(name)}"
            for name in {**before, **self.identity}
            if before.get(name) != self.identity.get(name)
        ]
        if other:
            raise UserError(
                f"{self.partial} is of another run: {'; '.join(other)}. Give another embed.output, or remove it and "
                f"{self._journal} to start over"
            )
        return progress

    def _header(self, rows: int) -> bytes:
        """The .npy header, of the same length for any number of rows."""
        header = io.BytesIO()
        shape = (rows, *self._row_shape)
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
        return header.getvalue()

    def put(self, row: int, vectors: np.ndarray) -> None:
        """Write the vectors [layers, h] of one row of the current window."""
        if self._rows_file is None:
            self._rows_file = self._open()
        self._rows_file.seek(len(self._header(0)) + row * self._row_bytes)
        self._rows_file.write(np.ascontiguousarray(vectors, dtype="<f4").tobytes())

    def end_window(self, ids: Sequence[dict[str, Any]]) -> None:
        """Sync rows and ids, then the journal; all rows up to `progress.rows` must have been put. `ids` has a line per
        new row."""
        if self._rows_file is None:
            return  # no usable record so far: nothing is lost if they are read again
        for line in ids:
            self._id_file.write(json.dumps(line).encode() + b"\n")
        for file in (self._rows_file, self._id_file):
            file.flush()
            os.fsync(file.fileno())
        self.progress.ids_bytes = self._id_file.tell()
        write_text(self._journal, json.dumps({"identity": self.identity, "progress": asdict(self.progress)}))

    @property
    def ids_path(self) -> Path:
        return self.path.with_suffix(".ids.jsonl")

    @property
    def report_path(self) -> Path:
        return self.path.with_suffix(".report.json")

    def finish(self, report: dict[str, Any]) -> list[Path]:
        """Write the header and the report and give all files their final names; returns their paths."""
        rows = self._rows_file or self._open()
        rows.seek(0)
        rows.write(self._header(self.progress.rows))
        rows.close()
        self._id_file.close()
        written = [self.path, self.report_path]
        write_text(self.report_path, json.dumps(report, indent=1) + "\n")
        if self.path.suffix == ".parquet":
            self._write_parquet()
            self.partial.unlink()
            self._ids.unlink()
        else:
            os.replace(self._ids, self.ids_path)
            sync_file(self.partial)
            os.replace(self.partial, self.path)
            written.insert(1, self.ids_path)
        self._journal.unlink()
        sync_folder(self.path.parent)
        return written

    def _write_parquet(self) -> None:
        """Write columns `id`, `tokens`, `cut`, and for each layer a `layer_N` of fixed-size lists."""
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        with self._ids.open() as lines:
            whole_numbers = all(isinstance(json.loads(line)["id"], int) for line in lines)
        hidden = self._row_shape[-1]
        columns = [
            ("id", arrow.int64() if whole_numbers else arrow.string()),
            ("tokens", arrow.int32()),
            ("cut", arrow.bool_()),
            *((f"layer_{layer}", arrow.list_(arrow.float32(), hidden)) for layer in self.layers),
        ]
        schema = arrow.schema(columns)
        table = np.load(self.partial, mmap_mode="r").reshape(-1, len(self.layers), hidden)
        step = max(1, _COPIED_BYTES // self._row_bytes)
        with (
            self._ids.open() as lines,
            replacing(self.path) as temporary,
            parquet.ParquetWriter(temporary, schema) as writer,
        ):
            for start in range(0, len(table), step):
                part = table[start : start + step]
                facts = [json.loads(next(lines)) for _ in range(len(part))]
                ids = [one["id"] if whole_numbers else str(one["id"]) for one in facts]
                flat = [np.ascontiguousarray(part[:, column]).ravel() for column in range(len(self.layers))]
                arrays = [
                    arrow.array(ids, schema.field(0).type),
                    arrow.array([one["tokens"] for one in facts], arrow.int32()),
                    arrow.array([one["cut"] for one in facts], arrow.bool_()),
                    *(arrow.FixedSizeListArray.from_arrays(arrow.array(values), hidden) for values in flat),
                ]
                writer.write_table(arrow.Table.from_arrays(arrays, schema=schema))
