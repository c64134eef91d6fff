"""The implementation of `preprocess_sft.py`: sources, deduplication, and conversations to tokens and labels."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from megatron.common.atomic_files import write_text
from megatron.common.labels import IGNORE_INDEX
from megatron.data.header import ChatInfo, ConversationCounts
from megatron.data.indexed import token_dtype
from megatron.tokenizer import Tokenizer, build_tokenizer
from megatron.tokenizer.chat import Chat, Segment, ids_and_labels
from megatron.tokenizer.conversation import ChatError, Conversation, NothingToLearn, TrainOn
from megatron.tokenizer.template_chat import load_chat
from tools.datasets.encoding.conversations import digest, read_conversation
from tools.datasets.encoding.counts import SourceSummary, summary_table
from tools.datasets.encoding.encode import BadEntry, Encoded
from tools.datasets.encoding.pipeline import EncodingJob, HeaderMaker, IndexedOutput, State, identity_of, run_encoding
from tools.datasets.encoding.progress import Progress
from tools.datasets.encoding.records import Block, InputFiles, RecordError, SourceError, find_inputs, read_record

_SOURCE = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)(:(?P<share>[0-9.eE+-]+))?=(?P<files>.+)")
LABEL_DTYPE = np.dtype(np.int32)
DUPLICATE = "duplicate"
SAMPLE_LENGTHS = tuple(
    1 << power for power in range(10, 18)
)  # sample lengths for which longer conversations are counted


@dataclass(frozen=True)
class SftSource:
    name: str
    share: float | None
    inputs: InputFiles


def parse_sources(entries: Sequence[str], skip_bad: bool = False) -> list[SftSource]:
    """Parse `NAME[:SHARE]=FILES` entries. Raises SourceError."""
    sources = []
    for entry in entries:
        match = _SOURCE.fullmatch(entry)
        if match is None:
            raise SourceError(f"--source {entry}: expected NAME=FILES or NAME:SHARE=FILES")
        try:
            share = None if match["share"] is None else float(match["share"])
        except ValueError:
            raise SourceError(f"--source {entry}: the share {match['share']} is not a number") from None
        if share is not None and not (isfinite(share) and share > 0):
            raise SourceError(f"--source {entry}: the share {match['share']} is not a positive number")
        sources.append(SftSource(match["name"], share, find_inputs([match["files"]], skip_bad)))
    names = [source.name for source in sources]
    files = [file for source in sources for file in source.inputs.files]
    for kind, items in (("name", names), ("file", [str(file) for file in files])):
        twice = {item for item in items if items.count(item) > 1}
        if twice:
            raise SourceError(f"--source: the {kind} {twice.pop()} is given twice")
    if len({source.share is None for source in sources}) > 1:
        raise SourceError("--source: give shares to all sources or to none")
    for source in sources:
        source.inputs.check(None)
    return sources


@dataclass
class RecordCounts:
    """Counts of the reader for one source."""

    records: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    unknown: Counter[str] = field(default_factory=Counter)

    def of(self, state: State) -> ConversationCounts:
        """These counts combined with those of the encoder."""
        duplicates = {DUPLICATE: self.duplicates} if self.duplicates else {}
        return ConversationCounts(
            records=self.records,
            formats=dict(self.formats),
            dropped={**duplicates, **state.dropped},
            unknown_keys=dict(self.unknown.most_common()),
            longer_than=dict(sorted(state.longer.items(), key=lambda pair: int(pair[0]))),
        )


@dataclass
class ConversationBlocks:
    """Blocks of conversations without duplicates. Runs in the parent, so that the first occurrence is kept."""

    sources: list[SftSource]
    thinking_prompt: bool
    progress: Progress
    counts: dict[str, RecordCounts] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Block]:
        seen: set[bytes] = set()
        for source in self.sources:
            counts = self.counts[source.name] = RecordCounts()
            for block in source.inputs.blocks(None, None, self.progress):
                records = [self._read(block, position, seen, counts) for position in range(len(block))]
                yield Block(block.source, block.first, block.unit, records=records, bytes=block.bytes)

    def _read(
        self, block: Block, position: int, seen: set[bytes], counts: RecordCounts
    ) -> Conversation | BadEntry | None:
        """A conversation, the problem of the record, or None if it is blank or a duplicate."""
        try:
            record: dict[str, Any] | None = read_record(block, position)
            if record is None:
                return None
            counts.records += 1
            if block.unit == "row":
                record = without_nulls(record)
            read = read_conversation(record, self.thinking_prompt)
        except (ChatError, RecordError) as error:
            return BadEntry(error.rule, f"{block.where(position)}: {error}")
        counts.formats[read.format] += 1
        counts.unknown.update(read.unknown)
        key = digest(read.conversation.messages)
        if key in seen:
            counts.duplicates += 1
            return None
        seen.add(key)
        return read.conversation


def without_nulls(value: Any) -> Any:
    """A table row without null fields at any depth: a table gives every tool call the arguments of all others."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class ChatEncoder:
    """Conversations of a block -> tokens and labels, in the two outputs of the block's source."""

    tokenizer: Tokenizer
    chat: Chat
    train_on: TrainOn
    dtype: np.dtype
    place: dict[str, int]  # file -> index of its source
    outputs: int
    lengths: Sequence[int]  # of samples; longer conversations are counted

    def __call__(self, block: Block) -> list[Encoded]:
        results = [Encoded() for _ in range(self.outputs)]
        text, labels = results[2 * self.place[block.source] :][:2]
        conversations: list[list[Segment]] = []
        for position, conversation in enumerate(block.records or []):
            if isinstance(conversation, BadEntry):
                text.bad.append(conversation)
            elif conversation is not None:
                try:
                    conversations.append(self.chat.segments(conversation, self.train_on))
                except NothingToLearn as error:
                    text.dropped[error.rule] += 1
                except ChatError as error:
                    text.bad.append(BadEntry(error.rule, f"{block.where(position)}: {error}"))
                else:
                    said = (m.content + (m.reasoning or "") for m in conversation.messages)
                    text.text_bytes += sum(len(words.encode(errors="replace")) for words in said)
        self._encode(conversations, text, labels)
        return results

    def _encode(self, conversations: list[list[Segment]], text: Encoded, labels: Encoded) -> None:
        texts = [s.text for segments in conversations for s in segments if s.text is not None]
        encoded = iter(self.tokenizer.encode_batch(texts))
        pairs = [
            ids_and_labels(segments, [next(encoded) for s in segments if s.text is not None])
            for segments in conversations
        ]
        if not pairs:
            return
        ids = np.concatenate([np.array(pair[0], np.int64) for pair in pairs])
        targets = np.concatenate([np.array(pair[1], np.int64) for pair in pairs])
        text.sizes = labels.sizes = np.array([len(pair[0]) for pair in pairs], np.int32)
        text.tokens, labels.tokens = ids.astype(self.dtype).tobytes(), targets.astype(LABEL_DTYPE).tobytes()
        text.max_token = int(ids.max())
        text.learned = int((targets != IGNORE_INDEX).sum())
        for length in self.lengths:
            text.longer[str(length)] += int((text.sizes > length + 1).sum())


def preprocess_conversations(options: argparse.Namespace) -> None:
    """Run the job described by the command line."""
    skip_bad = options.on_bad_record == "skip"
    sources = parse_sources(options.source, skip_bad)
    tokenizer = build_tokenizer(options.tokenizer_type, options.vocab_file)
    tokenizer.encode_arrays([""])  # lazy initialization, inherited by the workers
    arguments = _template_arguments(options.template_arguments)
    chat = load_chat(options.chat_template, tokenizer, arguments)
    # Outputs: tokens and labels of each source.
    dtype = token_dtype(tokenizer.vocab_size)
    prefixes = [f"{options.output_prefix}_{source.name}" for source in sources]
    progress = Progress(sum(source.inputs.bytes for source in sources), options.log_interval)
    blocks = ConversationBlocks(sources, options.thinking_prompt, progress)
    lengths = SAMPLE_LENGTHS if options.seq_length is None else (options.seq_length,)
    names = {index: name for name, index in tokenizer.special_tokens.items()}

    def header(source: SftSource) -> HeaderMaker:
        def chat_info(state: State) -> ChatInfo:
            return ChatInfo(
                template=chat.name,
                train_on=options.train_on,
                learned_tokens=state.learned,
                counts=blocks.counts[source.name].of(state),
                template_text=chat.template,
                end_of_turn={names[index]: index for index in chat.end_of_turn},
            )

        return HeaderMaker(tokenizer, dtype, tokenizer.bos, None, False, source.inputs, chat_info)

    outputs = [
        output
        for source, prefix in zip(sources, prefixes, strict=True)
        for output in (
            IndexedOutput(f"{prefix}_document", dtype, header(source)),
            IndexedOutput(f"{prefix}_label_document", LABEL_DTYPE, None),
        )
    ]
    settings = [
        chat.name,
        options.train_on,
        options.thinking_prompt,
        options.on_bad_record,
        prefixes,
        arguments,
        lengths,
    ]
    states = run_encoding(
        EncodingJob(
            identity=identity_of(tokenizer, [file for source in sources for file in source.inputs.files], settings),
            encoder=ChatEncoder(
                tokenizer=tokenizer,
                chat=chat,
                train_on=options.train_on,
                dtype=dtype,
                place={str(file): i for i, source in enumerate(sources) for file in source.inputs.files},
                outputs=len(outputs),
                lengths=lengths,
            ),
            blocks=blocks,
            progress=progress,
            outputs=outputs,
            journal=Path(f"{options.output_prefix}.partial.json"),
            workers=options.workers,
            skip_bad=skip_bad,
            num_docs=None,
        )
    )
    # Report what became of the records, and write the keys of a run.
    written = [(s, p, state) for s, p, state in zip(sources, prefixes, states[::2], strict=True)]
    print(
        summary_table(
            [
                SourceSummary(
                    name=source.name,
                    counts=blocks.counts[source.name].of(state),
                    documents=state.documents,
                    tokens=state.bytes // dtype.itemsize,
                    learned=state.learned,
                )
                for source, _, state in written
            ]
        )
    )
    for source in sources:
        for line in source.inputs.describe_bad():
            print(f"{source.name}: {line}" if not line.startswith(" ") else line, file=sys.stderr)
    kept = [(source, prefix) for source, prefix, state in written if state.documents]
    for source, _, state in written:
        if not state.documents:
            grow = "; the shares of the others grow" if source.share is not None else ""
            keys = f"{options.output_prefix}_train.yml"
            print(
                f"warning: source {source.name} has no conversations left, so it is not in {keys}{grow}",
                file=sys.stderr,
            )
    write_keys(Path(f"{options.output_prefix}_train.yml"), kept)


def _template_arguments(given: str | None) -> dict[str, Any]:
    if given is None:
        return {}
    try:
        arguments = json.loads(given)
    except ValueError as error:
        raise ChatError(f"--template-arguments {given}: not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise ChatError(
            f'--template-arguments {given}: expected a JSON object, such as {{"date_string": "1 Jan 2026"}}'
        )
    return arguments


def write_keys(path: Path, written: list[tuple[SftSource, str]]) -> None:
    """Write the YAML keys for training on the outputs: whole, isolated conversations in the shares of the mix."""
    lines = [
        "# Written by preprocess_sft.py: the data keys of a run on its outputs.",
        f"train_data_paths: {json.dumps([f'{prefix}_document' for _, prefix in written])}",
        f"train_label_data_paths: {json.dumps([f'{prefix}_label_document' for _, prefix in written])}",
    ]
    shares = [source.share for source, _ in written if source.share is not None]
    if shares:
        lines.append(f"train_data_weights: {json.dumps(shares)}")
    lines += ["pack_impl: best_fit", "isolate_documents: true"]
    write_text(path, "\n".join(lines) + "\n")
