"""`embed.py`: computes a file of vectors from a checkpoint and texts or images."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron.checkpoint.manifest import MANIFEST_NAME, file_checksum
from megatron.common.errors import UserError
from megatron.evaluation.driver import DrivenModel
from megatron.evaluation.embeddings.forward import WantedVectors
from megatron.evaluation.embeddings.images import ImageReader
from megatron.evaluation.embeddings.texts import BadText, EncodedInput, TextReader
from megatron.evaluation.embeddings.vector_file import VectorFile
from megatron.evaluation.prompts import PromptEncoder
from megatron.evaluation.session import with_model
from megatron.layout.peft_folder import WEIGHTS, adapter_folder
from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.keys.embeddings import chosen_layers

logger = logging.getLogger(__name__)

# Limits of a window, in records and bytes of inputs: it is sorted by length, and a killed run resumes at its end.
WINDOW, WINDOW_BYTES = 2048, 1 << 26
REQUEST_BYTES = 1 << 28  # bytes of vectors that ranks exchange at once
NAMED = 20  # number of skipped records that are named in full


def embed_texts(args: NeoXArgs) -> None:
    """Write the vectors that the keys ask for, their ids and a report. Collective."""
    # A slice of the sequence cannot be pooled by itself, and input lengths need not be divisible.
    with_model(args.model_copy(update={"sequence_parallel": False}), embed_and_write)


def embed_and_write(model: DrivenModel, checkpoint: Path | None) -> dict[str, Any]:
    """The program of rank 0; returns the report."""
    args, keys = model.args, model.args.embed
    reader, first, form = _reader(args)
    wanted = WantedVectors(chosen_layers(args), keys.pooling, first)
    identity = _identity(args, checkpoint, wanted) | form
    file = VectorFile(Path(keys.output), wanted.layers, args.hidden_size, identity)
    if file.progress.records:
        logger.info(f"resuming {file.partial}: {file.progress.rows} rows of {file.progress.records} records")
    inputs = reader.read(file.progress.records)
    while window := _next(inputs):
        _embed_window(model, wanted, file, window)
    progress = file.progress
    if progress.rows == 0:
        raise UserError(f"{keys.input} has nothing to embed; left out: {progress.left_out or 'nothing'}")
    report = {
        **identity,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "rows": progress.rows,
        _unit(args): progress.tokens,
        "cut": progress.cut,
        "left_out": progress.left_out,
        "named": progress.named,
        "seconds": progress.seconds,
    }
    written = file.finish(report)
    if progress.left_out or progress.cut:
        counts = [f"{count} left out: {rule}" for rule, count in progress.left_out.items()]
        print("; ".join([*counts, *([f"{progress.cut} cut to seq_length"] if progress.cut else [])]))
    print(
        f"{progress.rows} {'images' if args.reads_images else 'texts'}, {progress.tokens} {_unit(args)} in "
        f"{progress.seconds:.1f} s, {progress.tokens / max(progress.seconds, 1e-9):.0f} {_unit(args)}/s; layers "
        f"{', '.join(map(str, wanted.layers))}"
    )
    print(f"written to {', '.join(map(str, written))}")
    return report


def _reader(args: NeoXArgs) -> tuple[TextReader | ImageReader, int, dict[str, Any]]:
    """(reader of the inputs, number of leading tokens that are not pooled, settings that determine what is read)."""
    keys = args.embed
    if args.patches is not None:
        return ImageReader(args), 0, {"patch_settings": args.patches.model_dump()}
    encoder = PromptEncoder.of(args, chat=False)
    form = {
        "text_field": keys.text_field,
        "cut_long_texts": keys.cut_long_texts,
        "tokenizer": encoder.tokenizer.fingerprint,
    }
    return TextReader(keys, encoder, args.seq_length), len(encoder.beginning), form


def _identity(args: NeoXArgs, checkpoint: Path | None, wanted: WantedVectors) -> dict[str, Any]:
    """The settings that determine the vectors: a file started with other settings is not continued."""
    keys = args.embed
    assert keys.input is not None
    read = Path(f"{keys.input}.bin" if args.reads_images else keys.input).stat()
    return {
        "model": _fingerprint(args, checkpoint),
        "adapter": _adapter_checksum(args),
        "input": str(Path(keys.input).absolute()),
        "input_bytes": read.st_size,
        "input_changed": read.st_mtime,
        "id_field": keys.id_field,
        "layers": list(wanted.layers),
        "hidden_size": args.hidden_size,
        "pooling": wanted.pooling,
        "l2": keys.l2,
        "seq_length": args.seq_length,
        "precision": args.precision,
    }


def _unit(args: NeoXArgs) -> str:
    """The unit in which inputs are counted."""
    return "patches" if args.reads_images else "tokens"


def _fingerprint(args: NeoXArgs, checkpoint: Path | None) -> str:
    """Fingerprint of the weights: the digest in a checkpoint's manifest, which covers all files; else its path."""
    if checkpoint is None:
        return f"untrained, seed {args.seed}"
    manifest = checkpoint / MANIFEST_NAME
    digest = json.loads(manifest.read_text()).get("digest") if manifest.exists() else None
    return digest or str(checkpoint)


def _adapter_checksum(args: NeoXArgs) -> str | None:
    if args.lora is None or args.lora.load is None:
        return None
    given = Path(args.lora.load)
    return file_checksum((adapter_folder(given) or given) / WEIGHTS)


def _next(inputs: Iterator[EncodedInput | BadText]) -> list[EncodedInput | BadText]:
    """The next window of records, empty at the end."""
    window: list[EncodedInput | BadText] = []
    held = 0
    while len(window) < WINDOW and held < WINDOW_BYTES:
        one = next(inputs, None)
        if one is None:
            break
        window.append(one)
        held += one.values.nbytes if isinstance(one, EncodedInput) else 0
    return window


def _embed_window(
    model: DrivenModel, wanted: WantedVectors, file: VectorFile, window: list[EncodedInput | BadText]
) -> None:
    """Embed and write the records of a window; inputs of similar length run together, whatever their order."""
    start, keys, progress = time.perf_counter(), model.args.embed, file.progress
    for bad in (one for one in window if isinstance(one, BadText)):
        if keys.on_bad_record == "stop":
            raise UserError(f"{bad.message} (embed.on_bad_record: skip leaves such records out and counts them)")
        progress.left_out[bad.rule] = progress.left_out.get(bad.rule, 0) + 1
        if len(progress.named) < NAMED:
            progress.named.append(bad.message)
            print(f"skipped: {bad.message}")
    inputs = [one for one in window if isinstance(one, EncodedInput)]
    by_length = sorted(range(len(inputs)), key=lambda number: len(inputs[number].values))
    at_once = max(1, REQUEST_BYTES // (4 * len(wanted.layers) * model.args.hidden_size))
    for first in range(0, len(inputs), at_once):
        numbers = by_length[first : first + at_once]
        vectors = model.embed([inputs[number].values for number in numbers], wanted)
        if keys.l2:
            vectors = unit_vectors(vectors)
        for number, vector in zip(numbers, vectors, strict=True):
            file.put(progress.rows + number, vector)
    progress.records += len(window)
    progress.rows += len(inputs)
    progress.cut += sum(one.cut for one in inputs)
    progress.tokens += sum(len(one.values) for one in inputs)
    progress.seconds += time.perf_counter() - start
    file.end_window([{"id": one.id, "tokens": len(one.values), "cut": one.cut} for one in inputs])
    rate = progress.tokens / max(progress.seconds, 1e-9)
    logger.info(f"{progress.rows} rows, {rate:.0f} {_unit(model.args)}/s")


def unit_vectors(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors along the last axis to length 1; zero vectors stay zero."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)
