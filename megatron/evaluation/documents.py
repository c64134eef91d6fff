"""Perplexity of each document: per token, and as bits per byte, which do not depend on the tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from megatron.common.errors import UserError
from megatron.data.indexed import IndexedFile
from megatron.evaluation.driver import DrivenModel
from megatron.evaluation.prompts import PromptEncoder
from megatron.evaluation.rolling import rolling_pairs

DOCUMENTS_PER_REQUEST = 256


@dataclass(frozen=True)
class TextDocument:
    """A document: its token ids without begin- and end-of-text tokens, and its length in UTF-8 bytes."""

    source: str
    number: int
    ids: tuple[int, ...]
    num_bytes: int


@dataclass
class SourceLoss:
    """Sums over the documents of a source; losses in nats."""

    documents: int = 0
    tokens: int = 0
    num_bytes: int = 0
    loss_sum: float = 0.0
    document_losses: list[float] = field(default_factory=list)

    def add(self, document: TextDocument, loss: float) -> None:
        self.documents += 1
        self.tokens += len(document.ids)
        self.num_bytes += document.num_bytes
        self.loss_sum += loss
        self.document_losses.append(loss / len(document.ids))

    def facts(self) -> dict[str, Any]:
        losses = sorted(self.document_losses)
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.num_bytes,
            **rates(self.loss_sum, self.tokens, self.num_bytes),
            "median_document_loss": losses[len(losses) // 2],
        }


def rates(loss_sum: float, tokens: int, num_bytes: int) -> dict[str, float]:
    """Loss in nats per token, perplexity per token, and bits per byte, from a sum of losses in nats."""
    loss = loss_sum / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": loss_sum / math.log(2) / num_bytes,
    }


def evaluate_documents(model: DrivenModel, per_document: Path) -> dict[str, dict[str, Any]]:
    """Counts, loss, perplexity and bits per byte by source; a JSON line per document goes to `per_document`.

    Every token of every document is scored once, the first one after the begin-of-text token. Documents longer than
    `seq_length` are scored in pieces of that length, each with at least one token of context before it.
    """
    args = model.args
    encoder = PromptEncoder.of(args, chat=False)
    prefix = encoder.beginning[0] if encoder.beginning else encoder.tokenizer.eod
    sources: dict[str, SourceLoss] = {}
    with per_document.open("w") as file:
        for path in args.eval_documents or ():
            documents = read_documents(path, encoder)
            while part := list(islice(documents, DOCUMENTS_PER_REQUEST)):
                groups = [rolling_pairs(document.ids, prefix, args.seq_length) for document in part]
                scores = iter(model.score([pair for group in groups for pair in group]))
                for document, group in zip(part, groups, strict=True):
                    loss = -sum(next(scores).total for _ in group)
                    sources.setdefault(document.source, SourceLoss()).add(document, loss)
                    record = {
                        "source": document.source,
                        "document": document.number,
                        "tokens": len(document.ids),
                        "bytes": document.num_bytes,
                        **rates(loss, len(document.ids), document.num_bytes),
                    }
                    file.write(json.dumps(record) + "\n")
    return {name: source.facts() for name, source in sources.items()}


def read_documents(path: str, encoder: PromptEncoder) -> Iterator[TextDocument]:
    """Documents of a .jsonl file of texts, or of a .bin/.idx pair given by its prefix. Raises UserError."""
    return _texts(Path(path), encoder) if path.endswith(".jsonl") else _indexed(path, encoder)


def _texts(path: Path, encoder: PromptEncoder) -> Iterator[TextDocument]:
    try:
        lines = path.open(encoding="utf-8")
    except OSError as error:
        raise UserError(f"eval_documents {path}: {error.strerror}") from None
    number = 0
    with lines:
        for line_number, line in enumerate(lines, start=1):
            try:
                content = json.loads(line)
                text, source = content["text"], content.get("source", path.stem)
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
                raise UserError(f"{path}, line {line_number}: expected a JSON object with a text") from None
            if not isinstance(text, str) or not text or not isinstance(source, str):
                raise UserError(f"{path}, line {line_number}: text is empty, or text or source is not a string")
            yield TextDocument(
                source, number, tuple(encoder.tokenizer.encode(text)), len(text.encode(errors="replace"))
            )
            number += 1
    if number == 0:
        raise UserError(f"eval_documents {path} has no documents")


def _indexed(prefix: str, encoder: PromptEncoder) -> Iterator[TextDocument]:
    """Documents as training reads them, without the tokens that frame them; bytes are counted in the decoded text."""
    data, tokenizer = IndexedFile(prefix), encoder.tokenizer
    frame = {tokenizer.bos, tokenizer.eod}
    for number in range(data.documents):
        ids = data.document(number).tolist()
        while ids and ids[0] in frame:
            ids.pop(0)
        while ids and ids[-1] in frame:
            ids.pop()
        if not ids:
            raise UserError(f"{prefix}: document {number} has no text, only tokens that frame it")
        if max(ids) >= tokenizer.vocab_size:
            raise UserError(f"{prefix}: document {number} holds token {max(ids)}, which vocab_file does not have")
        yield TextDocument(Path(prefix).name, number, tuple(ids), len(tokenizer.decode(ids).encode()))
