"""Builds datasets from the YAML keys, and checks them on every rank before training starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from megatron.common.errors import UserError
from megatron.data.blend import Blend, mix, shares
from megatron.data.document_packing import WholeDocuments
from megatron.data.gpt_neox_order import GptNeoxPack, gpt_neox_mixture, samples_of_sources, weights_by_documents
from megatron.data.header import DataHeader, check_header, fingerprint, read_header
from megatron.data.image_sources import ImageSource, patch_form
from megatron.data.images import check_images
from megatron.data.indexed import DataError, open_indexed
from megatron.data.sample import SampleDataset, SampleForm, SampleSource
from megatron.data.skip_ranges import SampleRanges
from megatron.data.sources import OncePacked, RunningPack
from megatron.data.token_ids import known_ids, refuse_outside, refuse_special_outside
from megatron.parallel.collective_errors import RankGroup
from megatron.tokenizer import Tokenizer, build_tokenizer

if TYPE_CHECKING:
    from megatron.neox_arguments import NeoXArgs
    from megatron.neox_arguments.keys.data import DataSource, Replay


@dataclass
class Datasets:
    """What a run reads.

    `valid` and `test` are separate by source and hold every token once. `fingerprints` is the provenance of each
    prefix, `notes` are lines for the log. `train_iters` is the configured number or follows from `train_epochs`; None
    in a run that only evaluates.
    """

    blend: Blend | None
    valid: dict[str, SampleDataset]
    test: dict[str, SampleDataset]
    fingerprints: dict[str, dict[str, Any]]
    train_iters: int | None
    notes: list[str] = field(default_factory=list)

    @property
    def train(self) -> SampleDataset:
        """One order of samples over all training sources. Raises DataError in a run that only evaluates."""
        if self.blend is None:
            raise DataError(
                "no training data: the run takes no step, or split leaves no document of data_path to training"
            )
        return self.blend


@dataclass(frozen=True)
class _Part:
    """One data prefix of a stage, with the documents that the stage may read."""

    prefix: str
    labels: str | None = None
    documents: tuple[int, int] | None = None
    replay: Replay | None = None


def build_datasets(
    args: NeoXArgs, tokenizer: Tokenizer | None = None, *, iteration: int = 0, consumed_samples: int = 0
) -> Datasets:
    """Open, check and index all data of a run. Without `tokenizer`, that of `vocab_file` is loaded.

    The training order is long enough from its beginning and from the current position, samples to leave out included:
    `consumed_samples` after `iteration` steps may exceed what the configuration implies, if samples were left out or
    the batch was larger before. A longer order begins like a shorter one.

    Raises DataError, TokenizerError or OSError. If torch.distributed is initialized, every rank must call this; if any
    rank fails, all raise one DataError that says which and why.
    """
    position = iteration, consumed_samples
    if not (dist.is_available() and dist.is_initialized()):
        return _build(args, tokenizer, position)
    failure: Exception | None = None
    group = RankGroup.world(torch.device(args.device), DataError)
    try:
        datasets = _build(args, tokenizer, position, reads_ids=group.rank == 0)
    except (UserError, OSError) as error:
        failure = error
    group.agree("opening the data", failure)
    return datasets


def _build(args: NeoXArgs, tokenizer: Tokenizer | None, position: tuple[int, int], reads_ids: bool = True) -> Datasets:
    """`reads_ids`: check ids against the vocabulary even if a file has to be read for it; one rank does so for all."""
    stages = _parts(args)
    used = [part for parts in stages for part in parts]
    prefixes = sorted({part.prefix for part in used} | {part.labels for part in used if part.labels is not None})
    notes: list[str] = []
    opener: _Opener | _ImageOpener
    if args.reads_images:
        for prefix in prefixes:
            check_images(prefix, args)
        opener = _ImageOpener(args)
    else:
        opener = _text_opener(args, tokenizer, used, notes, reads_ids)
    return _datasets(args, stages, opener, position, prefixes, notes)


def _text_opener(
    args: NeoXArgs, tokenizer: Tokenizer | None, used: list[_Part], notes: list[str], reads_ids: bool
) -> _Opener:
    """Check headers, ids, labels and conversations of all parts."""
    if tokenizer is None and args.vocab_file is not None:
        tokenizer = build_tokenizer(args.tokenizer_type, args.vocab_file, args.merge_file)
    if tokenizer is not None:
        refuse_special_outside(tokenizer, args.vocab_size)
    headers = {prefix: read_header(prefix) for prefix in sorted({part.prefix for part in used})}
    for prefix, header in headers.items():
        if open_indexed(prefix).dtype.kind == "f":
            raise DataError(f"{prefix} holds {open_indexed(prefix).dtype} values, which are not tokens")
        if header is None:
            notes.append(f"{prefix}: no header beside the index, its tokenizer cannot be checked")
            if reads_ids:
                refuse_outside(prefix, *known_ids(prefix), args.vocab_size)
        else:
            check_header(prefix, header, tokenizer, args.vocab_size)
    for part in used:
        _check_conversations(part, headers[part.prefix], args)
    for labels in sorted({part.labels for part in used if part.labels is not None}):
        if reads_ids:
            refuse_outside(labels, *known_ids(labels), args.vocab_size, labels=True)
    masked = None
    if args.eod_mask_loss:
        assert tokenizer is not None  # the rule document_ends_are_known
        masked = tokenizer.eod
    form = SampleForm(args.seq_length, args.isolate_documents, masked, 0 if tokenizer is None else tokenizer.pad)
    return _Opener(args, form)


def _datasets(
    args: NeoXArgs,
    stages: tuple[list[_Part], list[_Part], list[_Part]],
    opener: _Opener | _ImageOpener,
    position: tuple[int, int],
    prefixes: list[str],
    notes: list[str],
) -> Datasets:
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
    # Length of the order: enough from the beginning of the run, and from its position.
    wanted = 0
    for iteration, consumed in ((0, 0), position):
        left = max(0, (train_iters or 0) - iteration) * args.train_batch_size
        wanted = max(wanted, SampleRanges(args.skip_sample_ranges).after(consumed, left))
    if train_parts and wanted:
        weights = args.train_data_weights
        if args.weight_by_num_documents:
            counts = [len(open_indexed(part.prefix)) for part in train_parts]
            weights = weights_by_documents(counts, args.weighted_sampler_alpha)
        if args.data_order == "gpt-neox":
            assert isinstance(opener, _Opener)  # a key of text
            blend = _gpt_neox_blend(args, train_parts, weights, opener.form, wanted)
        else:
            blend = _blend(train_parts, weights, opener, wanted)
        notes += [f"train: {line}" for line in blend.describe()]
    # Validation and test: one pass over each source.
    valid, test = _passes(valid_parts, opener), _passes(test_parts, opener)
    for stage, sources in (
        ("train", blend.sources if blend else []),
        ("valid", valid.values()),
        ("test", test.values()),
    ):
        notes += [f"{stage}: {line}" for source in sources for line in source.describe_left_out()]
    return Datasets(
        blend,
        dict(valid),
        dict(test),
        {prefix: fingerprint(prefix) for prefix in prefixes},
        train_iters,
        notes,
    )


@dataclass(frozen=True)
class _Opener:
    """Opens a part as samples, packed as the run packs them."""

    args: NeoXArgs
    form: SampleForm

    def __call__(self, part: _Part, samples: int | None) -> SampleSource:
        """`samples` samples over as many epochs as needed, or (None) each document once."""
        args = self.args
        if args.pack_impl != "packed":
            return WholeDocuments(
                part.prefix,
                self.form,
                args.seed,
                samples,
                args.pack_impl,
                bool(args.allow_chopped),
                part.documents,
                part.labels,
            )
        if samples is None:
            return OncePacked(part.prefix, self.form, args.seed, part.documents, part.labels)
        return RunningPack(part.prefix, self.form, args.seed, samples, part.documents, part.labels)

    def samples_per_epoch(self, part: _Part) -> float:
        return self(part, None if self.args.pack_impl == "packed" else 1).samples_per_epoch


@dataclass(frozen=True)
class _ImageOpener:
    """Opens a part that holds images."""

    args: NeoXArgs

    def __call__(self, part: _Part, samples: int | None) -> SampleSource:
        """`samples` samples over as many epochs as needed, or (None) each image once."""
        form = patch_form(part.prefix, self.args)
        return ImageSource(part.prefix, form, self.args.seed, samples, part.documents)

    def samples_per_epoch(self, part: _Part) -> float:
        return self(part, None).samples_per_epoch


def _epoch(parts: list[_Part], opener: _Opener | _ImageOpener) -> float:
    """Number of samples, replayed ones included, in which the sources without replay are read once."""
    replayed = sum(part.replay.share for part in parts if part.replay is not None)
    return sum(opener.samples_per_epoch(part) for part in parts if part.replay is None) / (1 - replayed)


def _blend(parts: list[_Part], weights: list[float] | None, opener: _Opener | _ImageOpener, wanted: int) -> Blend:
    replays = [part.replay for part in parts]
    epochs = [1.0] * len(parts) if not any(replays) else [opener.samples_per_epoch(part) for part in parts]
    mixture = mix(epochs, weights, replays, wanted)
    sources = [opener(part, count) for part, count in zip(parts, mixture.needed(len(parts)), strict=True)]
    return Blend(sources, mixture)


def _gpt_neox_blend(
    args: NeoXArgs, parts: list[_Part], weights: list[float] | None, form: SampleForm, wanted: int
) -> Blend:
    """The order of the run's whole length, whatever its position."""
    length = args.train_iters * args.train_batch_size
    if args.data_path is not None:
        counts, weights = [length], None
    else:
        weights = weights or [1.0] * len(parts)
        counts = samples_of_sources(weights, length)
    sources = [
        GptNeoxPack(part.prefix, form, args.seed, count, part.documents, part.labels)
        for part, count in zip(parts, counts, strict=True)
    ]
    global_micro = args.train_micro_batch_size_per_gpu * args.data_parallel_size
    return Blend(sources, gpt_neox_mixture([len(source) for source in sources], weights, wanted, global_micro))


def _check_conversations(part: _Part, header: DataHeader | None, args: NeoXArgs) -> None:
    """Raise DataError for conversations without labels, or that would be cut without `allow_chopped`."""
    if header is None or header.chat is None:
        return
    if part.labels is None:
        labels = part.prefix.removesuffix("_document") + "_label_document"
        raise DataError(
            f"{part.prefix} holds conversations, of which only the assistant's words are to be learned: give its label "
            f"file, {labels}, in train_label_data_paths (valid_label_data_paths, test_label_data_paths), with "
            f"train_data_paths and so on in place of data_path"
        )
    if args.pack_impl == "packed" and not args.allow_chopped:
        raise DataError(
            f"{part.prefix} holds conversations, and pack_impl: packed cuts them wherever a sample ends: answers would "
            f"stand without their question. Set pack_impl: best_fit, which keeps them whole, or allow_chopped: true"
        )


def _passes(parts: Sequence[_Part], opener: _Opener | _ImageOpener) -> dict[str, SampleSource]:
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


def _parts(args: NeoXArgs) -> tuple[list[_Part], list[_Part], list[_Part]]:
    """Train, validation and test parts: `data_path` cut by `split`, or the paths given for each."""
    explicit = (args.train_data_paths, args.valid_data_paths, args.test_data_paths)
    if args.data_path is not None:
        count = len(open_indexed(args.data_path))
        ranges = split_documents(args.split, count)
        train, valid, test = ([_Part(args.data_path, None, r)] if r[1] > r[0] else [] for r in ranges)
        return train, valid, test
    if not any(explicit):
        raise DataError("no data: give data_path, or train_data_paths with valid_data_paths")
    labels = (args.train_label_data_paths, args.valid_label_data_paths, args.test_label_data_paths)
    stages = []
    for paths, label_paths in zip(explicit, labels, strict=True):
        entries: Sequence[str | DataSource] = paths or []
        label_entries: Sequence[str | None] = label_paths or [None] * len(entries)
        stages.append([_part(*pair) for pair in zip(entries, label_entries, strict=True)])
    return stages[0], stages[1], stages[2]


def _part(entry: str | DataSource, labels: str | None) -> _Part:
    return _Part(entry, labels) if isinstance(entry, str) else _Part(entry.path, labels, replay=entry.replay)


def split_documents(split: str, count: int) -> list[tuple[int, int]]:
    """Document ranges of train, validation and test for shares such as "969,30,1" (or with slashes, or fewer)."""
    try:
        numbers = [float(part) for part in split.replace("/", ",").split(",") if part.strip()]
    except ValueError:
        raise DataError(f"split {split!r}: expected up to three numbers such as 969,30,1") from None
    if not 1 <= len(numbers) <= 3:
        raise DataError(f"split {split!r}: expected one to three numbers, got {len(numbers)}")
    if not all(map(isfinite, numbers)) or min(numbers) < 0 or sum(numbers) == 0:
        raise DataError(f"split {split!r}: expected numbers of at least 0 with a positive sum")
    # GPT-NeoX rounds the parts, not the borders, and moves all borders by what the parts then miss or exceed.
    parts = [round(float(share) * count) for share in shares(numbers + [0.0] * (3 - len(numbers)))]
    excess = sum(parts) - count
    ends = [max(0, int(end) - excess) for end in np.cumsum(parts)]
    return list(zip([0, *ends[:2]], ends, strict=True))
