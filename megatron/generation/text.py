"""Text from a checkpoint at any TP x PP, by recomputation: every token runs the whole sequence once.

There is no key/value cache. Sequences are padded on the right to `seq_length`, which a causal model does not see, so
that the pipeline's buffers keep their shape.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.common.errors import UserError
from megatron.engine.protocol import Engine
from megatron.neox_arguments import NeoXArgs


def continue_text(
    engine: Engine, args: NeoXArgs, prompt: list[int], ends: Collection[int], generator: torch.Generator
) -> tuple[list[int], bool]:
    """New token ids after `prompt`, at most `maximum_tokens`, and whether one of `ends` came. Collective.

    Raises UserError for a prompt that cannot be continued.
    """
    check_prompt(args, prompt)
    ids = list(prompt)
    while len(ids) < args.seq_length and len(ids) - len(prompt) < args.maximum_tokens:
        token = _next_token(engine, args, ids, generator)
        if token in ends:
            return ids[len(prompt) :], True
        ids.append(token)
    return ids[len(prompt) :], False


def check_prompt(args: NeoXArgs, prompt: list[int]) -> None:
    """Raise UserError for a prompt that is empty, fills `seq_length`, or holds ids that the model does not have."""
    if not 0 < len(prompt) < args.seq_length:
        raise UserError(f"a prompt of {len(prompt)} tokens; expected 1 to {args.seq_length - 1} (seq_length - 1)")
    if max(prompt) >= args.vocab_size:
        raise UserError(
            f"a prompt with token id {max(prompt)}; the model has only the ids 0 to {args.vocab_size - 1}. Give the "
            f"model's own tokenizer as vocab_file"
        )


def choose(logits: Tensor, args: NeoXArgs, generator: torch.Generator) -> int:
    """A token from logits [vocab_size]: the most likely at temperature 0, else sampled within top_k and top_p."""
    if args.temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits.float().cpu() / args.temperature).softmax(-1).sort(descending=True)
    if args.top_k:
        probabilities[args.top_k :] = 0
    if args.top_p:
        before = probabilities.cumsum(0) - probabilities  # the most likely token always stays
        probabilities[before >= args.top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def _next_token(engine: Engine, args: NeoXArgs, ids: list[int], generator: torch.Generator) -> int:
    place, pipe = engine.place, engine.groups.pipe
    chosen = torch.zeros(1, dtype=torch.int64, device=place.device)
    logits = _last_logits(engine, args, ids)
    if logits is not None:
        chosen[0] = choose(logits, args, generator)
    if place.pp > 1:
        dist.broadcast(chosen, src=dist.get_global_rank(pipe, place.pp - 1), group=pipe)
    return int(chosen)


def _last_logits(engine: Engine, args: NeoXArgs, ids: list[int]) -> Tensor | None:
    """Logits [vocab_size] after the last id, the same on every tensor-parallel rank of the last stage, else None."""
    tokens = torch.zeros(args.train_micro_batch_size_per_gpu, args.seq_length, dtype=torch.int64)
    tokens[:, : len(ids)] = torch.tensor(ids)
    positions = torch.arange(args.seq_length).expand_as(tokens).contiguous() if args.isolate_documents else None
    logits = engine.logits(tokens, positions)
    if logits is None:
        return None
    local = logits[0, len(ids) - 1].contiguous()
    parts = [torch.empty_like(local) for _ in range(engine.place.tp)]
    dist.all_gather(parts, local, group=engine.groups.tensor)
    return torch.cat(parts)[: args.vocab_size]
