"""Log-probabilities of continuations at any TP x PP x DP, independent of the other items in a batch.

Every input is padded on the right to a length that depends only on its own, and every micro-batch has
`train_micro_batch_size_per_gpu` rows: an item is computed by the same kernels in the same shapes, whatever else is in
the batch. Continuations with the same input, such as four letters after one question, share its forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron.common.errors import UserError
from megatron.common.labels import IGNORE_INDEX
from megatron.engine.batches import ScoreBatch
from megatron.engine.protocol import Engine
from megatron.neox_arguments import NeoXArgs

LENGTH_STEP = 64  # inputs are padded to multiples of it


class ScoringError(UserError, ValueError):
    """A pair that cannot be scored, or scores that are not finite; the message names it."""


@dataclass(frozen=True)
class Pair:
    """Token ids of a context, at least one, and of the continuation whose log-probability is wanted."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class PairScore:
    """Log-probability of each continuation token in nats, and whether greedy decoding would give the continuation."""

    log_probs: tuple[float, ...]
    is_greedy: bool

    @property
    def total(self) -> float:
        return sum(self.log_probs)


@dataclass
class _Row:
    """One input of the model, and its queries: (position, token whose log-probability after it is wanted)."""

    tokens: tuple[int, ...]
    queries: list[tuple[int, int]] = field(default_factory=list)
    first: int = 0  # index of the first query among all queries of the call


def score_pairs(engine: Engine, args: NeoXArgs, pairs: Sequence[Pair]) -> list[PairScore]:
    """Scores in the order of `pairs`, the same on all ranks. Collective; every rank passes the same pairs.

    Raises ScoringError for a pair that has no context or no continuation, is longer than `seq_length` + 1 tokens, or
    has an id outside the vocabulary, and for scores that are not finite.
    """
    for number, pair in enumerate(pairs):
        _check(pair, args, number)
    rows, places = _rows(pairs)
    queries = sum(len(row.queries) for row in rows)
    found = torch.zeros(2, queries, dtype=torch.float32, device=engine.place.device)
    for length, group in sorted(_by_length(rows, args.seq_length).items()):
        _score_rows(engine, args.train_micro_batch_size_per_gpu, group, length, found)
    dist.all_reduce(found)  # each column is computed on one rank, the others add exact zeros
    log_probs, greedy = found[0].tolist(), found[1].tolist()
    scores = [
        PairScore(tuple(log_probs[first : first + count]), all(greedy[first : first + count]))
        for first, count in places
    ]
    _check_finite(scores)
    return scores


def _check(pair: Pair, args: NeoXArgs, number: int) -> None:
    length = len(pair.context) + len(pair.continuation)
    if not pair.context or not pair.continuation:
        raise ScoringError(f"pair {number} has an empty {'continuation' if pair.context else 'context'}")
    if length > args.seq_length + 1:
        raise ScoringError(
            f"pair {number} has {length} tokens, seq_length {args.seq_length} allows {args.seq_length + 1}; shorten "
            f"it, or raise seq_length up to max_position_embeddings {args.max_position_embeddings}"
        )
    highest = max(*pair.context, *pair.continuation)
    if highest >= args.vocab_size:
        raise ScoringError(
            f"pair {number} holds token {highest}, the model's vocabulary ends at {args.vocab_size - 1}; "
            f"is vocab_file the tokenizer of this model?"
        )


def _check_finite(scores: Sequence[PairScore]) -> None:
    wrong = [number for number, score in enumerate(scores) if not -float("inf") < score.total < float("inf")]
    if wrong:
        raise ScoringError(
            f"the scores of {len(wrong)} of {len(scores)} pairs are not finite, the first of them in pair {wrong[0]}: "
            f"the weights are damaged or overflow in this precision; try precision: fp32"
        )


def _rows(pairs: Sequence[Pair]) -> tuple[list[_Row], list[tuple[int, int]]]:
    """The distinct inputs, and for each pair (index of its first query, number of its queries)."""
    rows: dict[tuple[int, ...], _Row] = {}
    within: list[tuple[_Row, int, int]] = []
    for pair in pairs:
        tokens = (*pair.context, *pair.continuation[:-1])
        row = rows.setdefault(tokens, _Row(tokens))
        within.append((row, len(row.queries), len(pair.continuation)))
        row.queries += enumerate(pair.continuation, start=len(pair.context) - 1)
    first = 0
    for row in rows.values():
        row.first = first
        first += len(row.queries)
    return list(rows.values()), [(row.first + offset, count) for row, offset, count in within]


def _by_length(rows: Sequence[_Row], longest: int) -> dict[int, list[_Row]]:
    groups: dict[int, list[_Row]] = {}
    for row in rows:
        padded = min(-(-len(row.tokens) // LENGTH_STEP) * LENGTH_STEP, longest)
        groups.setdefault(padded, []).append(row)
    return groups


def _score_rows(engine: Engine, micro_batch: int, rows: list[_Row], length: int, found: torch.Tensor) -> None:
    """Score rows of one padded length and write the results to `found` [2, queries], on the ranks that have them."""
    place = engine.place
    chunks = [rows[start : start + micro_batch] for start in range(0, len(rows), micro_batch)]
    rounds = -(-len(chunks) // place.dp)
    own = chunks[place.dp_rank :: place.dp]
    own += [[]] * (rounds - len(own))  # replicas take part in every round, some with padding only
    batches = _batches(own, micro_batch, length) if place.reads_data else None
    scores = engine.token_scores(batches, rounds)
    if scores is None or not place.counts_tokens:
        return
    for chunk, values in zip(own, scores, strict=True):
        for number, row in enumerate(chunk):
            count = len(row.queries)
            found[:, row.first : row.first + count] = values[:, number, :count]


def _batches(chunks: list[list[_Row]], micro_batch: int, length: int) -> Iterator[ScoreBatch]:
    for chunk in chunks:
        asked = max((len(row.queries) for row in chunk), default=1)
        tokens = torch.zeros(micro_batch, length, dtype=torch.int64)
        at = torch.zeros(micro_batch, asked, dtype=torch.int64)
        queried = torch.full((micro_batch, asked), IGNORE_INDEX)
        for number, row in enumerate(chunk):
            tokens[number, : len(row.tokens)] = torch.tensor(row.tokens)
            count = len(row.queries)
            positions, wanted = zip(*row.queries, strict=True)
            at[number, :count], queried[number, :count] = torch.tensor(positions), torch.tensor(wanted)
        yield ScoreBatch(tokens, at, queried)
