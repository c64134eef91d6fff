"""The output file: JSON lines with GPT-NeoX's fields, written as sequences end and finally sorted by prompt."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.common.atomic_files import replacing
from megatron.common.errors import UserError
from megatron.generation.requests import Request
from megatron.generation.sequences import Continuation, Endings
from megatron.parallel.place import Place
from megatron.tokenizer.conversation import THINK_END


def record_of(request: Request, sequence: Continuation, endings: Endings, show_thinking: bool) -> dict[str, Any]:
    """The record of a finished sequence.

    GPT-NeoX's fields: `context`, `text`, `length` (new tokens), `finished` (by a stop token or string), `message`,
    `duration_seconds`.
    """
    trace, text = endings.split(sequence)
    message = None
    if trace is not None and not sequence.closed:
        message = f"the trace has no {THINK_END}: there is no answer"
    return {
        "index": request.number,
        "sample": sequence.sample,
        "context": request.context,
        "text": text,
        **({"reasoning_content": trace.strip("\n")} if trace is not None and show_thinking else {}),
        "length": len(sequence.new),
        "finished": sequence.end == "stop",
        "end": sequence.end,
        "context_length": len(sequence.prompt),
        "message": message,
        "duration_seconds": time.perf_counter() - sequence.started,
        **({"input": request.fields} if request.fields else {}),
    }


def record_of_error(request: Request) -> dict[str, Any]:
    """The record of a prompt that was not continued."""
    return {
        "index": request.number,
        "sample": 0,
        "context": request.context,
        "text": None,
        "length": 0,
        "finished": False,
        "end": "error",
        "context_length": 0,
        "message": request.error,
        "duration_seconds": 0.0,
        **({"input": request.fields} if request.fields else {}),
    }


class SampleFile:
    """The output file. The first rank of each replica writes; until `finish`, replicas after the first have their own
    files."""

    def __init__(self, path: Path, place: Place) -> None:
        self.path, self.place = path, place
        self._file: io.TextIOWrapper | None = None
        if place.first_stage and place.tp_rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A lone surrogate, from a broken JSON escape, is written as the original escape.
            self._file = self._part(place.dp_rank).open("w", encoding="utf-8", errors="backslashreplace")

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Write and flush records, on ranks that write. Raises UserError if writing fails."""
        if self._file is not None:
            try:
                self._file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
                self._file.flush()
            except OSError as error:
                raise UserError(f"sample_output_file {self.path}: {error.strerror}; records so far are kept") from error

    def finish(self) -> None:
        """Merge all files into one, in the order of the prompts. Collective over all ranks."""
        if self._file is not None:
            self._file.close()
        dist.barrier()
        if self.place.rank == 0:
            self._merge()
        dist.barrier()

    def _merge(self) -> None:
        parts = [self._part(replica) for replica in range(self.place.dp)]
        lines = [line for part in parts for line in part.read_bytes().splitlines(keepends=True)]
        ordered = sorted(lines, key=_order)
        if ordered != lines or len(parts) > 1:
            with replacing(self.path) as temporary:
                temporary.write_bytes(b"".join(ordered))
        for part in parts[1:]:
            part.unlink()

    def _part(self, replica: int) -> Path:
        return self.path if replica == 0 else self.path.with_name(f"{self.path.name}.replica_{replica}")


def _order(line: bytes) -> tuple[int, int]:
    record = json.loads(line)
    return record["index"], record["sample"]
