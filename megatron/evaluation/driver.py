"""Runs a program on rank 0 that uses a model spread over many ranks; the other ranks serve its requests.

lm-eval, a multiple-choice test or any other program runs only on rank 0, as if the model were in its process. The other
ranks wait for requests, which rank 0 broadcasts, and take part in answering them. Programs and libraries thus need not
know about ranks.

While rank 0 is busy with its own work (reading questions, bootstrapping an error bar), one of its threads tells the
other ranks every minute to keep waiting, so that neither the collective timeout nor the watchdog takes this for a hang.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from megatron.common.errors import UserError, one_line
from megatron.engine.protocol import Engine
from megatron.evaluation.answers import AnswerText, AnswerWriter, TextLimits
from megatron.evaluation.embeddings.forward import WantedVectors, pooled_vectors
from megatron.evaluation.scoring import Pair, PairScore, score_pairs
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.collective_errors import RankGroup
from megatron.supervision.status_store import Whereabouts

logger = logging.getLogger(__name__)

KEEP_WAITING_SECONDS = 60.0
PAIRS_PER_REQUEST = 2048  # keeps the buffers of a request small
PROMPTS_PER_REQUEST = 64

T = TypeVar("T")


class _Request(Protocol):
    """A request from rank 0; `answer` is collective."""

    def answer(self, writer: AnswerWriter) -> Any: ...


@dataclass(frozen=True)
class _Scores:
    pairs: Sequence[Pair]

    def answer(self, writer: AnswerWriter) -> list[PairScore]:
        return score_pairs(writer.engine, writer.args, self.pairs)


@dataclass(frozen=True)
class _Texts:
    prompts: Sequence[tuple[int, ...]]
    limits: TextLimits
    first: int

    def answer(self, writer: AnswerWriter) -> list[AnswerText]:
        return writer.continue_prompts(self.prompts, self.limits, self.first)


@dataclass(frozen=True)
class _Vectors:
    texts: Sequence[np.ndarray]
    wanted: WantedVectors

    def answer(self, writer: AnswerWriter) -> Tensor:
        return pooled_vectors(writer.engine, writer.args, self.texts, self.wanted)


@dataclass(frozen=True)
class _Wait:
    def answer(self, writer: AnswerWriter) -> None:
        return None


@dataclass(frozen=True)
class _End:
    """The last request; `error` is set if rank 0 ends with a user error."""

    error: str | None


class DrivenModel:
    """The model as seen by the program on rank 0."""

    def __init__(self, engine: Engine, args: NeoXArgs, whereabouts: Whereabouts) -> None:
        self.args = args
        self.tokens = 0  # number of tokens that went through the model
        self._writer, self._whereabouts = AnswerWriter(engine, args), whereabouts
        self._ranks = RankGroup.world(engine.place.device)
        self._one_at_a_time = threading.Lock()
        self._ended = threading.Event()
        self._failed = False
        self._waiting = threading.Thread(target=self._keep_others_waiting, daemon=True)
        if self._ranks.size > 1:
            self._waiting.start()

    def score(self, pairs: Sequence[Pair]) -> list[PairScore]:
        """`score_pairs` for any number of pairs; scores in the order of `pairs`."""
        scores: list[PairScore] = []
        # Pairs with the same context stay together where possible: they may share a forward pass.
        ordered = sorted(range(len(pairs)), key=lambda i: (len(pairs[i].context), pairs[i].context))
        for start in range(0, len(pairs), PAIRS_PER_REQUEST):
            part = [pairs[i] for i in ordered[start : start + PAIRS_PER_REQUEST]]
            scores += self._ask(_Scores(part))
            self.tokens += sum(map(len, {(*pair.context, *pair.continuation[:-1]) for pair in part}))
            self._report("scored", len(scores), len(pairs))
        back = dict(zip(ordered, scores, strict=True))
        return [back[number] for number in range(len(pairs))]

    def generate(self, prompts: Sequence[tuple[int, ...]], limits: TextLimits) -> list[AnswerText]:
        """`AnswerWriter.continue_prompts` for any number of prompts."""
        texts: list[AnswerText] = []
        for start in range(0, len(prompts), PROMPTS_PER_REQUEST):
            texts += self._ask(_Texts(prompts[start : start + PROMPTS_PER_REQUEST], limits, start))
            self._report("answered", len(texts), len(prompts))
        self.tokens += sum(map(len, prompts)) + sum(len(text.ids) for text in texts)
        return texts

    def embed(self, texts: Sequence[np.ndarray], wanted: WantedVectors) -> np.ndarray:
        """`pooled_vectors` for as many texts as fit into one request."""
        vectors = self._ask(_Vectors(texts, wanted))
        self.tokens += sum(map(len, texts))
        return vectors.cpu().numpy()

    def _report(self, what: str, done: int, total: int) -> None:
        if total > done or total > PAIRS_PER_REQUEST:
            logger.info(f"{what} {done} of {total}")

    def _ask(self, request: _Request) -> Any:
        with self._one_at_a_time:
            if self._failed:
                raise RuntimeError("an earlier request failed on the other ranks, which have ended")
            try:
                self._ranks.broadcast(request)
                answer = request.answer(self._writer)
            except BaseException:
                self._failed = True  # it failed on the other ranks as well, or they have ended
                raise
            self._whereabouts.at("the program of rank 0")
            return answer

    def _keep_others_waiting(self) -> None:
        device = self._writer.engine.place.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the current device is a setting of each thread
        with contextlib.suppress(Exception):  # the main thread reports errors
            while not self._ended.wait(KEEP_WAITING_SECONDS):
                with self._one_at_a_time:
                    if self._failed or self._ended.is_set():
                        return
                    self._ranks.broadcast(_Wait())
                    self._whereabouts.at("the program of rank 0")

    def end(self, error: BaseException | None) -> None:
        """Release the other ranks; after a UserError they raise the same error."""
        self._ended.set()
        if self._waiting.is_alive():
            self._waiting.join()
        if not self._failed:
            self._ranks.broadcast(_End(one_line(error) if isinstance(error, UserError) else None))
            self._writer.close()


def drive(engine: Engine, args: NeoXArgs, whereabouts: Whereabouts, program: Callable[[DrivenModel], T]) -> T | None:
    """Run `program` on rank 0 while the other ranks serve it; its result on rank 0, None elsewhere. Collective.

    A UserError in the program is raised on all ranks. After any other exception the other ranks return normally.
    """
    if engine.place.rank != 0:
        _serve(engine, args, whereabouts)
        return None
    whereabouts.at("the program of rank 0")
    model = DrivenModel(engine, args, whereabouts)
    try:
        result = program(model)
    except BaseException as error:
        model.end(error)
        raise
    model.end(None)
    return result


def _serve(engine: Engine, args: NeoXArgs, whereabouts: Whereabouts) -> None:
    ranks, writer = RankGroup.world(engine.place.device), AnswerWriter(engine, args)
    while True:
        whereabouts.at("waiting for rank 0")
        request: Any = ranks.broadcast(None)
        if isinstance(request, _End):
            writer.close()
            if request.error is not None:
                raise UserError(request.error)
            return
        request.answer(writer)
