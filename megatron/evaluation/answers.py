"""Generated answers: the one place where evaluation meets `megatron.generation`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron.engine.protocol import Engine
from megatron.generation.text import continue_text
from megatron.neox_arguments import NeoXArgs
from megatron.tokenizer import Tokenizer, build_tokenizer

TOKENS_BETWEEN_LOOKS = 16  # for a stop string, which can be seen in decoded text only


@dataclass(frozen=True)
class TextLimits:
    """Where a text ends: a number of tokens, one of several end tokens, or a text that it comes to contain."""

    max_tokens: int
    stop_ids: tuple[int, ...]
    stop_texts: tuple[str, ...] = ()
    temperature: float = 0.0


@dataclass(frozen=True)
class AnswerText:
    """New token ids without the end token; `ended` says that an end token or a stop text came, not a limit."""

    ids: tuple[int, ...]
    ended: bool


def continue_prompts(
    engine: Engine, args: NeoXArgs, prompts: Sequence[tuple[int, ...]], limits: TextLimits, first: int = 0
) -> list[AnswerText]:
    """A continuation of every prompt. Collective; every rank gives the same prompts.

    Prompt i is sampled with numbers of its own, from (seed, `first` + i). A prompt that fills `seq_length` is a
    UserError.
    """
    assert args.vocab_file is not None  # checked with the configuration
    tokenizer = build_tokenizer(args.tokenizer_type, args.vocab_file, args.merge_file) if limits.stop_texts else None
    found = []
    for number, prompt in enumerate(prompts, start=first):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + number)
        found.append(_continue(engine, args, list(prompt), limits, tokenizer, generator))
    return found


def _continue(
    engine: Engine,
    args: NeoXArgs,
    prompt: list[int],
    limits: TextLimits,
    tokenizer: Tokenizer | None,
    generator: torch.Generator,
) -> AnswerText:
    new: list[int] = []
    most = min(limits.max_tokens, args.seq_length - len(prompt))
    while len(new) < most or not new:
        look = most - len(new) if tokenizer is None else min(TOKENS_BETWEEN_LOOKS, most - len(new))
        settings = args.model_copy(update={"maximum_tokens": look, "temperature": limits.temperature})
        part, ended = continue_text(engine, settings, prompt + new, limits.stop_ids, generator)
        new += part
        if ended:
            return AnswerText(tuple(new), True)
        if tokenizer is not None and any(text in tokenizer.decode(new) for text in limits.stop_texts):
            return AnswerText(tuple(new), True)
    return AnswerText(tuple(new), False)
