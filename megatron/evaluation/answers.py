"""Generated answers: the one place where evaluation meets `megatron.generation`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.engine.protocol import Engine
from megatron.generation.generate import Batching, Generator, generate
from megatron.generation.sampling import RandomNumbers, Sampling
from megatron.generation.sequences import Continuation, Endings
from megatron.neox_arguments import NeoXArgs
from megatron.tokenizer import build_tokenizer


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

    Prompt i is sampled with numbers of its own, from (seed, `first` + i). A prompt longer than `seq_length` is a
    UserError.
    """
    assert args.vocab_file is not None  # checked with the configuration
    tokenizer = build_tokenizer(args.tokenizer_type, args.vocab_file, args.merge_file) if limits.stop_texts else None
    sequences = [
        Continuation(
            number,
            0,
            list(prompt),
            limits.max_tokens,
            RandomNumbers(args.seed, number, 0) if limits.temperature else None,
        )
        for number, prompt in enumerate(prompts, start=first)
    ]
    endings = Endings(frozenset(limits.stop_ids), limits.stop_texts, None if tokenizer is None else tokenizer.decode)
    sampling = Sampling(limits.temperature, args.top_k, args.top_p)
    generator = Generator(engine, args, Batching(args.generation_batch_size, args.prefill_chunk))
    try:
        return [AnswerText(tuple(s.new), s.end == "stop") for s in generate(generator, sequences, sampling, endings)]
    finally:
        generator.close()
