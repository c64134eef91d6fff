"""The work of `preprocess_sft.py`: sources, deduplication, and blocks of conversations to tokens and labels."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron.common.labels import IGNORE_INDEX
from megatron.data.header import ChatInfo
from megatron.data.indexed import DataError, token_dtype
from megatron.tokenizer import Tokenizer, build_tokenizer
from megatron.tokenizer.chat import Chat, ChatError, Message, Segment, TrainOn, ids_and_labels, load_chat
from tools.datasets.encoding.conversations import digest, read_conversation
from tools.datasets.encoding.encode import Encoded
from tools.datasets.encoding.pipeline import EncodingJob, HeaderMaker, IndexedOutput, State, identity_of, run_encoding
from tools.datasets.encoding.records import Block, SourceError, expand, read_blocks, read_record

_SOURCE = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)(:(?P<share>[0-9.eE+-]+))?=(?P<files>.+)")
LABEL_DTYPE = np.dtype(np.int32)


@dataclass(frozen=True)
class SftSource:
    name: str
    share: float | None
    files: list[Path]


def parse_sources(entries: Sequence[str]) -> list[SftSource]:
    """`NAME[:SHARE]=FILES` entries. Raises SourceError."""
    sources = []
    for entry in entries:
        match = _SOURCE.fullmatch(entry)
        if match is None:
            raise SourceError(f"--source {entry}: expected NAME=FILES or NAME:SHARE=FILES")
        try:
            share = None if match["share"] is None else float(match["share"])
        except ValueError:
            raise SourceError(f"--source {entry}: the share {match['share']} is not a number") from None
        sources.append(SftSource(match["name"], share, expand([match["files"]])))
    names = [source.name for source in sources]
    files = [file for source in sources for file in source.files]
    for kind, items in (("name", names), ("file", [str(file) for file in files])):
        twice = {item for item in items if items.count(item) > 1}
        if twice:
            raise SourceError(f"--source: the {kind} {twice.pop()} is given twice")
    if len({source.share is None for source in sources}) > 1:
        raise SourceError("--source: give every source a share, or none")
    return sources


@dataclass
class Deduplicated:
    """Blocks without the conversations that were there before. Runs in the parent, so the order decides, always."""

    sources: list[SftSource]
    thinking_prompt: bool
    duplicates: dict[str, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Block]:
        seen: set[bytes] = set()
        for source in self.sources:
            self.duplicates[source.name] = 0
            for file in source.files:
                for block in read_blocks(file, None):
                    records = [self._read(block, position, seen, source) for position in range(len(block))]
                    yield Block(block.source, block.first, block.unit, records=records)

    def _read(self, block: Block, position: int, seen: set[bytes], source: SftSource) -> list[Message] | str | None:
        """The messages of a record, what is wrong with it, or None if it is blank or was there before."""
        try:
            record = read_record(block, position)
            if record is None:
                return None
            messages = read_conversation(record, self.thinking_prompt)
        except ValueError as error:
            return str(error)
        key = digest(messages)
        if key in seen:
            self.duplicates[source.name] += 1
            return None
        seen.add(key)
        return messages


@dataclass(frozen=True)
class ChatEncoder:
    """Conversations of a block -> tokens and labels, in the two outputs of the block's source."""

    tokenizer: Tokenizer
    chat: Chat
    train_on: TrainOn
    dtype: np.dtype
    place: dict[str, int]  # file -> number of its source
    outputs: int

    def __call__(self, block: Block) -> list[Encoded]:
        results = [Encoded() for _ in range(self.outputs)]
        text, labels = results[2 * self.place[block.source] :][:2]
        conversations: list[list[Segment]] = []
        for position, messages in enumerate(block.records or []):
            if messages is None:
                continue
            try:
                if isinstance(messages, str):
                    raise ChatError(messages)
                conversations.append(self.chat.segments(messages, self.train_on))
                text.text_bytes += sum(len(m.content.encode(errors="replace")) for m in messages)
            except ChatError as error:
                text.bad.append(f"{block.where(position)}: {error}")
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


def preprocess_conversations(options: argparse.Namespace) -> None:
    """Run the job that the command line describes."""
    sources = parse_sources(options.source)
    tokenizer = build_tokenizer(options.tokenizer_type, options.vocab_file)
    tokenizer.encode_arrays([""])  # what it prepares at its first use, the workers inherit
    chat = load_chat(options.chat_template, tokenizer)
    dtype = token_dtype(tokenizer.vocab_size)
    prefixes = [f"{options.output_prefix}_{source.name}" for source in sources]
    blocks = Deduplicated(sources, options.thinking_prompt)

    def chat_info(state: State) -> ChatInfo:
        return ChatInfo(template=chat.name, train_on=options.train_on, learned_tokens=state.learned)

    outputs = [
        output
        for source, prefix in zip(sources, prefixes, strict=True)
        for output in (
            IndexedOutput(
                f"{prefix}_document",
                dtype,
                HeaderMaker(tokenizer, dtype, tokenizer.bos, None, False, source.files, chat_info),
            ),
            IndexedOutput(f"{prefix}_label_document", LABEL_DTYPE, None),
        )
    ]
    settings = [chat.name, options.train_on, options.thinking_prompt, options.on_bad_record, prefixes]
    states = run_encoding(
        EncodingJob(
            identity=identity_of(tokenizer, [file for source in sources for file in source.files], settings),
            encoder=ChatEncoder(
                tokenizer=tokenizer,
                chat=chat,
                train_on=options.train_on,
                dtype=dtype,
                place={str(file): i for i, source in enumerate(sources) for file in source.files},
                outputs=len(outputs),
            ),
            blocks=blocks,
            outputs=outputs,
            journal=Path(f"{options.output_prefix}.partial.json"),
            workers=options.workers,
            skip_bad=options.on_bad_record == "skip",
            log_interval=options.log_interval,
            num_docs=None,
        )
    )
    for source, prefix, state in zip(sources, prefixes, states[::2], strict=True):
        tokens = state.bytes // dtype.itemsize
        print(
            f"{prefix}: {blocks.duplicates[source.name]} duplicates left out, {state.learned} of {tokens} tokens are "
            f"learned ({state.learned / tokens:.1%})",
            file=sys.stderr,
        )
    write_keys(Path(f"{options.output_prefix}_train.yml"), sources, prefixes)


def write_keys(path: Path, sources: list[SftSource], prefixes: list[str]) -> None:
    """The YAML keys that train on the outputs: whole conversations, each by itself, in the shares of the mix."""
    lines = [
        "# Written by preprocess_sft.py: the data keys of a run on its outputs.",
        f"train_data_paths: {json.dumps([f'{prefix}_document' for prefix in prefixes])}",
        f"train_label_data_paths: {json.dumps([f'{prefix}_label_document' for prefix in prefixes])}",
    ]
    shares = [source.share for source in sources if source.share is not None]
    if shares:
        if min(shares) <= 0:
            raise DataError("--source: shares must be positive")
        lines.append(f"train_data_weights: {json.dumps(shares)}")
    lines += ["pack_impl: best_fit", "isolate_documents: true"]
    path.write_text("\n".join(lines) + "\n")
