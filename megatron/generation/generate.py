"""Continues many prompts at any TP x PP x DP, with a key/value cache.

Sequences are divided among data-parallel replicas. A pipeline has as many groups of sequences in flight as stages:
while the last stage chooses tokens for one group, the other stages work on the following groups.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.common.errors import UserError
from megatron.engine.protocol import Around, Engine, no_phases
from megatron.generation.groups import Pass, SequenceGroup
from megatron.generation.sampling import NOT_FINITE, Sampling, choose
from megatron.generation.sequences import Continuation, Endings
from megatron.generation.stages import StageLinks
from megatron.model.cache import input_shape
from megatron.model.pipeline import PARAMETER_DTYPES
from megatron.neox_arguments import NeoXArgs

OnTokens = Callable[[Continuation, list[int]], None]


@dataclass(frozen=True)
class Batching:
    """Number of sequences that a group decodes at once, and of prompt tokens per forward pass."""

    slots: int = 8
    chunk: int = 512


class Generator:
    """Continues sequences on an engine. Construction and `close` are collective over all ranks.

    It keeps the links between stages, and the cached keys and values, so that in the next turn of a conversation only
    the new part is processed: all calls must use the same weights. `around(phase)` surrounds each rank's work and
    waiting.
    """

    def __init__(self, engine: Engine, args: NeoXArgs, batching: Batching, around: Around = no_phases) -> None:
        self.engine, self.args, self.place, self.batching = engine, args, engine.place, batching
        self.links = StageLinks(engine, args.distributed_timeout_minutes, around)
        self._groups = [
            SequenceGroup(batching.slots, args.seq_length, batching.chunk, self.place.device)
            for _ in range(self.place.pp)
        ]
        self.first_layer = engine.stage_layers(self.place.pp_rank).start

    def close(self) -> None:
        self.links.close()

    @property
    def cache_bytes(self) -> int:
        """Size of the cached keys and values on this rank."""
        return sum(group.cache.bytes for group in self._groups)

    def own_share(self, sequences: Sequence[Continuation]) -> list[Continuation]:
        """The sequences of a run that this data-parallel replica continues."""
        return list(sequences[self.place.dp_rank :: self.place.dp])

    @torch.inference_mode()
    def run(
        self,
        sequences: Sequence[Continuation],
        sampling: Sampling,
        endings: Endings,
        on_tokens: OnTokens | None = None,
        on_end: Callable[[Continuation], None] | None = None,
    ) -> None:
        """Continue this replica's sequences until all have ended. Collective over the ranks of the replica.

        Every rank calls `on_tokens(sequence, new ids)` after each step of a sequence and `on_end` when it has ended.
        Raises UserError on all ranks for a prompt that cannot be continued, and for logits that are not finite.
        """
        check_prompts(sequences, self.args)
        queue, unfinished = deque(sequences), len(sequences)
        groups = self._groups[: min(self.place.pp, max(1, len(sequences)))]
        under_way: list[tuple[Pass, Tensor | None] | None] = [None] * len(groups)
        # In turn, take each group's tokens from its previous pass and start its next one.
        while unfinished:
            for index, group in enumerate(groups):
                if (before := under_way[index]) is not None:
                    ended = self._learn(group, *before, endings, on_tokens)
                    unfinished -= len(ended)
                    for sequence in ended if on_end is not None else ():
                        on_end(sequence)  # type: ignore[misc]
                share = -(-unfinished // len(groups))
                work = group.plan(queue, share)
                under_way[index] = None if work is None else (work, self._forward(work, sampling))

    def _forward(self, work: Pass, sampling: Sampling) -> Tensor | None:
        """Run this stage's part of a forward pass; returns the chosen tokens [n] on the last stage, else None."""
        place, tokens = self.place, work.tokens
        inputs = work.ids
        if not place.first_stage:
            shape = input_shape(self.first_layer, self.args.num_layers, self.args.hidden_size, tokens)
            inputs = self.links.receive_hidden(shape, PARAMETER_DTYPES[self.args.precision])
        result = self.engine.forward_cached(inputs, tokens)
        if not place.last_stage:
            self.links.send_hidden(result)
            return None
        if not work.chosen:
            return None
        chosen = self._choose(result[:, 0], work.chosen, sampling)
        if place.pp > 1:
            self.links.publish_tokens(chosen)
        return chosen

    def _choose(self, local: Tensor, sequences: list[Continuation], sampling: Sampling) -> Tensor:
        numbers = np.zeros(len(sequences))
        if not sampling.greedy:
            numbers = np.array([s.random.at(len(s.new)) for s in sequences if s.random is not None])
        seen = None
        if sampling.penalises:
            seen = torch.zeros(len(sequences), self.args.vocab_size, dtype=torch.bool)
            for row, sequence in enumerate(sequences):
                seen[row, torch.tensor(sequence.prompt + sequence.new)] = True
            seen = seen.to(local.device)
        return choose(local, sampling, self.args.vocab_size, self.engine.groups.tensor, numbers, seen)

    def _learn(
        self, group: SequenceGroup, work: Pass, chosen: Tensor | None, endings: Endings, on_tokens: OnTokens | None
    ) -> list[Continuation]:
        """Append the tokens chosen after a forward pass; returns the sequences that have ended."""
        if not work.chosen:
            return []
        tokens = self.links.receive_tokens(len(work.chosen)) if chosen is None else chosen
        ids = tokens.tolist()
        if NOT_FINITE in ids:
            bad = work.chosen[ids.index(NOT_FINITE)]
            raise UserError(
                f"prompt {bad.number + 1}: the logits of new token {len(bad.new) + 1} are not finite. The checkpoint "
                f"holds NaN or weights that overflow; `convert_hf verify` compares it with its source"
            )
        before = [len(sequence.new) for sequence in work.chosen]
        ended = group.advance(work, ids, endings)
        if on_tokens is not None:
            for sequence, length in zip(work.chosen, before, strict=True):
                on_tokens(sequence, sequence.new[length:])
        return ended


def check_prompts(sequences: Sequence[Continuation], args: NeoXArgs) -> None:
    """Raise UserError for a prompt that cannot be continued."""
    for sequence in sequences:
        if reason := why_not(sequence.prompt, args):
            raise UserError(f"prompt {sequence.number + 1}: {reason}")


def why_not(prompt: Sequence[int], args: NeoXArgs) -> str | None:
    """The reason why a prompt cannot be continued; None if it can."""
    if not 0 < len(prompt) <= args.seq_length:
        return f"it has {len(prompt)} tokens; expected 1 to {args.seq_length} (seq_length)"
    if max(prompt) >= args.vocab_size:
        return (
            f"it has the token id {max(prompt)}; the model has only the ids 0 to {args.vocab_size - 1}. Give the "
            f"model's own tokenizer as vocab_file"
        )
    return None


def generate(
    generator: Generator, sequences: Sequence[Continuation], sampling: Sampling, endings: Endings
) -> list[Continuation]:
    """Continue all sequences of the run and return them on every rank. Collective over all ranks."""
    own = generator.own_share(sequences)
    generator.run(own, sampling, endings)
    place = generator.place
    if place.dp == 1:
        return own
    parts: list[list[Continuation]] = [[] for _ in range(place.dp)]
    dist.all_gather_object(parts, own, group=generator.engine.groups.data)
    result = [parts[index % place.dp][index // place.dp] for index in range(len(sequences))]
    return result
