"""From the YAML keys to datasets, checked on every rank before training begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch.distributed as dist

from megatron.data.blend import Blend, Replay, mix, shares
from megatron.data.document_packing import Packing, WholeDocuments
from megatron.data.header import check_header, fingerprint, read_header
from megatron.data.indexed import DataError, open_indexed
from megatron.data.sample import SampleDataset, SampleForm
from megatron.data.skip_ranges import SampleRanges
from megatron.data.sources import OncePacked, RunningPack, Source
from megatron.tokenizer import Tokenizer, TokenizerError, build_tokenizer


class SourceEntry(Protocol):
    """An entry of `train_data_paths` that says more than a path."""

    @property
    def path(self) -> str: ...
    @property
    def replay(self) -> Replay | None: ...


class DataArgs(Protocol):
    """The keys of a run that decide its data; NeoXArgs has them."""

    @property
    def data_path(self) -> str | None: ...
    @property
    def split(self) -> str: ...
    @property
    def train_data_paths(self) -> Sequence[str | SourceEntry] | None: ...
    @property
    def valid_data_paths(self) -> list[str] | None: ...
    @property
    def test_data_paths(self) -> list[str] | None: ...
    @property
    def train_label_data_paths(self) -> list[str] | None: ...
    @property
    def valid_label_data_paths(self) -> list[str] | None: ...
    @property
    def test_label_data_paths(self) -> list[str] | None: ...
    @property
    def train_data_weights(self) -> list[float] | None: ...
    @property
    def tokenizer_type(self) -> str: ...
    @property
    def vocab_file(self) -> str | None: ...
    @property
    def vocab_size(self) -> int | None: ...
    @property
    def seq_length(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def eod_mask_loss(self) -> bool: ...
    @property
    def isolate_documents(self) -> bool: ...
    @property
    def pack_impl(self) -> Literal["packed"] | Packing: ...
    @property
    def allow_chopped(self) -> bool: ...
    @property
    def train_iters(self) -> int | None: ...
    @property
    def train_epochs(self) -> float | None: ...
    @property
    def train_batch_size(self) -> int: ...
    @property
    def skip_sample_ranges(self) -> Sequence[Sequence[int]]: ...


@dataclass
class Datasets:
    """What a run reads. `valid` and `test` are apart by source and hold every token once. `fingerprints` are the
    provenance of each prefix, `notes` lines for the log. `train_iters` is the run's own or what `train_epochs` come to,
    None in a run that only evaluates."""

    blend: Blend | None
    valid: dict[str, SampleDataset]
    test: dict[str, SampleDataset]
    fingerprints: dict[str, dict[str, str | int]]
    train_iters: int | None
    notes: list[str] = field(default_factory=list)

    @property
    def train(self) -> SampleDataset:
        """One order of samples over all training sources. Raises DataError in a run that only evaluates."""
        if self.blend is None:
            raise DataError("no training data: give train_data_paths, or data_path with a split that has training")
        return self.blend


@dataclass(frozen=True)
class _Part:
    """One data prefix of a stage, with the documents that the stage may read."""

    prefix: str
    labels: str | None = None
    documents: tuple[int, int] | None = None
    replay: Replay | None = None


def build_datasets(
    args: DataArgs, tokenizer: Tokenizer | None = None, *, iteration: int = 0, consumed_samples: int = 0
) -> Datasets:
    """Open, check and index all data of a run. Without `tokenizer` the one of `vocab_file` is loaded.

    The training order holds as many samples as the run reads or leaves out, from its beginning on and from where it
    stands: `consumed_samples` after `iteration` steps may be more than the configuration explains, where samples were
    left out, or the batch was larger, before. A longer order begins like a shorter one.

    Raises DataError or TokenizerError. Where torch.distributed is initialised every rank must call this, and if one
    rank fails, all raise its message.
    """
    problem: Exception | None = None
    try:
        datasets = _build(args, tokenizer, (iteration, consumed_samples))
    except (DataError, TokenizerError, OSError) as error:
        problem = error
    _agree(problem)
    return datasets


def _agree(problem: Exception | None) -> None:
    """Raise on every rank what went wrong on any, so that no rank waits for one that has stopped."""
    if not (dist.is_available() and dist.is_initialized()):
        if problem is not None:
            raise problem
        return
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, None if problem is None else str(problem))
    if problem is not None:
        raise problem
    failed = [(rank, text) for rank, text in enumerate(told) if text is not None]
    if failed:
        raise DataError(f"on rank {failed[0][0]} and {len(failed) - 1} others: {failed[0][1]}")


def _build(args: DataArgs, tokenizer: Tokenizer | None, position: tuple[int, int]) -> Datasets:
    if tokenizer is None and args.vocab_file is not None:
        tokenizer = build_tokenizer(args.tokenizer_type, args.vocab_file)
    stages = _parts(args)
    used = [part for parts in stages for part in parts]
    prefixes = sorted({part.prefix for part in used} | {part.labels for part in used if part.labels is not None})
    notes = []
    for prefix in sorted({part.prefix for part in used}):
        header = read_header(prefix)
        open_indexed(prefix)
        if header is None:
            notes.append(f"{prefix}: no header beside the index, its tokenizer cannot be checked")
        else:
            check_header(prefix, header, tokenizer, args.vocab_size)
    masked = None
    if args.eod_mask_loss:
        if tokenizer is None:
            raise DataError("eod_mask_loss needs the end-of-document id: give tokenizer_type and vocab_file")
        masked = tokenizer.eod
    form = SampleForm(args.seq_length, args.isolate_documents, masked, 0 if tokenizer is None else tokenizer.pad)
    opener = _Opener(args, form)
    train_parts, valid_parts, test_parts = stages
    blend = None
    train_iters = args.train_iters
    if train_iters is None and args.train_epochs is not None and train_parts:
        epoch = _epoch(train_parts, opener)
        train_iters = max(1, round(args.train_epochs * epoch / args.train_batch_size))
        notes.append(
            f"train: {args.train_epochs:g} epochs of {epoch:,.0f} samples are {train_iters} iterations of "
            f"{args.train_batch_size}"
        )
    wanted = 0
    for iteration, consumed in ((0, 0), position):
        left = max(0, (train_iters or 0) - iteration) * args.train_batch_size
        wanted = max(wanted, SampleRanges(args.skip_sample_ranges).after(consumed, left))
    if train_parts and wanted:
        blend = _blend(train_parts, args.train_data_weights, opener, wanted)
        notes += [f"train: {line}" for line in blend.describe()]
    return Datasets(
        blend,
        _passes(valid_parts, opener),
        _passes(test_parts, opener),
        {prefix: fingerprint(prefix) for prefix in prefixes},
        train_iters,
        notes,
    )


@dataclass(frozen=True)
class _Opener:
    """Opens a part in the way that the run packs its samples."""

    args: DataArgs
    form: SampleForm

    def __call__(self, part: _Part, samples: int | None) -> Source:
        """Endless for `samples` samples, or (None) each document once."""
        args = self.args
        if args.pack_impl != "packed":
            return WholeDocuments(
                part.prefix,
                self.form,
                args.seed,
                samples,
                args.pack_impl,
                args.allow_chopped,
                part.documents,
                part.labels,
            )
        if samples is None:
            return OncePacked(part.prefix, self.form, args.seed, part.documents, part.labels)
        return RunningPack(part.prefix, self.form, args.seed, samples, part.documents, part.labels)

    def samples_per_epoch(self, part: _Part) -> float:
        return self(part, None if self.args.pack_impl == "packed" else 1).samples_per_epoch


def _epoch(parts: list[_Part], opener: _Opener) -> float:
    """Samples of the run, replayed ones included, in which the sources without replay are read once."""
    replayed = sum(part.replay.share for part in parts if part.replay is not None)
    return sum(opener.samples_per_epoch(part) for part in parts if part.replay is None) / (1 - replayed)


def _blend(parts: list[_Part], weights: list[float] | None, opener: _Opener, wanted: int) -> Blend:
    replays = [part.replay for part in parts]
    epochs = [1.0] * len(parts) if not any(replays) else [opener.samples_per_epoch(part) for part in parts]
    mixture = mix(epochs, weights, replays, wanted)
    sources = [opener(part, count) for part, count in zip(parts, mixture.needed(len(parts)), strict=True)]
    return Blend(sources, mixture)


def _passes(parts: Sequence[_Part], opener: _Opener) -> dict[str, SampleDataset]:
    """One dataset per source, under names that tell the sources apart."""
    names = _names([part.prefix for part in parts])
    return {name: opener(part, None) for name, part in zip(names, parts, strict=True)}


def _names(prefixes: Sequence[str]) -> list[str]:
    """The last part of each path, with as many parent folders as it takes to tell them apart."""
    if len(set(prefixes)) != len(prefixes):
        raise DataError(f"the same validation or test data is given twice: {', '.join(prefixes)}")
    parts = [Path(prefix).parts for prefix in prefixes]
    depth = 1
    while len({p[-depth:] for p in parts}) != len(parts):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def _parts(args: DataArgs) -> tuple[list[_Part], list[_Part], list[_Part]]:
    """Train, validation and test parts: `data_path` cut by `split`, or the paths given for each."""
    explicit = (args.train_data_paths, args.valid_data_paths, args.test_data_paths)
    if args.data_path is not None:
        if any(explicit):
            raise DataError("give either data_path (with split) or train_/valid_/test_data_paths, not both")
        count = len(open_indexed(args.data_path))
        ranges = split_documents(args.split, count)
        train, valid, test = ([_Part(args.data_path, None, r)] if r[1] > r[0] else [] for r in ranges)
        return train, valid, test
    if not any(explicit):
        raise DataError("no data: give data_path, or train_data_paths with valid_data_paths")
    labels = (args.train_label_data_paths, args.valid_label_data_paths, args.test_label_data_paths)
    stages = []
    for name, paths, label_paths in zip(("train", "valid", "test"), explicit, labels, strict=True):
        paths = paths or []
        if label_paths and len(label_paths) != len(paths):
            raise DataError(
                f"{name}_label_data_paths has {len(label_paths)} entries for {len(paths)} {name}_data_paths"
            )
        stages.append([_part(entry, label_paths[i] if label_paths else None) for i, entry in enumerate(paths)])
    return stages[0], stages[1], stages[2]


def _part(entry: str | SourceEntry, labels: str | None) -> _Part:
    return _Part(entry, labels) if isinstance(entry, str) else _Part(entry.path, labels, replay=entry.replay)


def split_documents(split: str, count: int) -> list[tuple[int, int]]:
    """Document ranges of train, validation and test for shares such as "969,30,1" (or with slashes, or fewer)."""
    try:
        numbers = [float(part) for part in split.replace("/", ",").split(",") if part.strip()]
    except ValueError:
        raise DataError(f"split {split!r}: expected up to three numbers such as 969,30,1") from None
    if not 1 <= len(numbers) <= 3:
        raise DataError(f"split {split!r}: expected one to three numbers, got {len(numbers)}")
    ends = [round(float(end) * count) for end in np.cumsum(shares(numbers + [0.0] * (3 - len(numbers))))]
    return list(zip([0, *ends[:2]], ends, strict=True))
