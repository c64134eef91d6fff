"""Generated answers: the only place where evaluation uses `megatron.generation`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron.engine.protocol import Engine
from megatron.generation.generate import Batching, Generator, generate
from megatron.generation.sampling import RandomNumbers, Sampling
from megatron.generation.sequences import Continuation, Endings
from megatron.neox_arguments import NeoXArgs
from megatron.tokenizer import Tokenizer, build_tokenizer


@dataclass(frozen=True)
class TextLimits:
    """Where a generated text ends (maximum number of tokens, end tokens, stop texts), and its temperature."""

    max_tokens: int
    stop_ids: tuple[int, ...]
    stop_texts: tuple[str, ...] = ()
    temperature: float = 0.0


@dataclass(frozen=True)
class AnswerText:
    """New token ids without the end token; `ended` is True after an end token or stop text, False at a limit."""

    ids: tuple[int, ...]
    ended: bool


class AnswerWriter:
    """Continues prompts on an engine. The generator is created for the first prompts, and then kept.

    Its creation and `close` are collective, because pipeline stages have separate links for it.
    """

    def __init__(self, engine: Engine, args: NeoXArgs) -> None:
        self.engine, self.args = engine, args

    @cached_property
    def _generator(self) -> Generator:
        batching = Batching(self.args.generation_batch_size, self.args.prefill_chunk)
        return Generator(self.engine, self.args, batching)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        assert self.args.vocab_file is not None  # checked with the configuration
        return build_tokenizer(self.args.tokenizer_type, self.args.vocab_file, self.args.merge_file)

    def continue_prompts(
        self, prompts: Sequence[tuple[int, ...]], limits: TextLimits, first: int = 0
    ) -> list[AnswerText]:
        """Continue every prompt. Collective; every rank passes the same prompts.

        Prompt i is sampled with its own random numbers, from (seed, `first` + i). Raises UserError for a prompt longer
        than `seq_length`.
        """
        args = self.args
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
        decode = self._tokenizer.decode if limits.stop_texts else None
        endings = Endings(frozenset(limits.stop_ids), limits.stop_texts, decode)
        sampling = Sampling(limits.temperature, args.top_k, args.top_p)
        done = generate(self._generator, sequences, sampling, endings)
        return [AnswerText(tuple(s.new), s.end == "stop") for s in done]

    def close(self) -> None:
        if "_generator" in vars(self):
            self._generator.close()
