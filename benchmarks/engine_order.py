"""The operations of a step under engine: megatron, rank by rank, recorded, and then replayed to find waiting times.

    record(pipe, virtual, m) -> [[Event]]         one process acts as every rank in turn, under torch's "fake" group
    play(orders, forward, backward, message)      raises DeadlockError, or gives the step's time and compute times

The engine is real: its groups, its links, megatron-core's schedule and autograd. Only layers are replaced, by one
multiplication each, and messages, by records of them. Messages on a link are sequential; each starts when both ends
have posted it and the previous one has arrived.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from examples.llama_keys import LLAMA
from megatron.engine import mcore_links
from megatron.engine.mcore import MegatronEngine
from megatron.engine.mcore_batches import PipelineBatch
from megatron.engine.mcore_chunks import Chunk
from megatron.engine.protocol import no_phases
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.place import Place


class Event(NamedTuple):
    """A pass of `micro_batch` through `chunk`, or one end of message `number` of a link: posted, or waited for.

    A link is named by its kind ("hidden", "gradient") and the stage that sends on it.
    """

    what: Literal["forward", "backward", "send", "receive", "wait"]
    chunk: int = -1
    micro_batch: int = -1
    link: tuple[str, int] = ("", -1)
    number: int = -1


class DeadlockError(RuntimeError):
    """Ranks wait for each other forever."""


# --- recorded


def record(pipe: int, virtual: int, num_micro_batches: int) -> list[list[Event]]:
    """The operations of every rank of a pipeline in one training step, in order."""
    return [_record_rank(rank, pipe, virtual, num_micro_batches) for rank in range(pipe)]


def small_arguments(pipe: int, virtual: int, num_micro_batches: int) -> NeoXArgs:
    """A model with one layer per virtual stage."""
    return NeoXArgs.from_dict(
        {
            "num_layers": pipe * virtual,
            "hidden_size": 8,
            "num_attention_heads": 1,
            "num_kv_heads": 1,
            "intermediate_size": 8,
            **LLAMA,
            "vocab_size": 8,
            "make_vocab_size_divisible_by": 1,
            "no_weight_tying": True,
            "max_position_embeddings": 8,
            "rotary_emb_base": 10000,
            "rms_norm_epsilon": 1e-5,
            "seq_length": 8,
            "train_iters": 1,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": num_micro_batches,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "train_data_paths": ["unused"],
            "from_scratch": True,
            "distributed_backend": "gloo",
            "engine": "megatron",
            "overlap_grad_reduce": False,
            "pipe_parallel_size": pipe,
            "virtual_pipe_parallel_size": virtual,
        },
        world_size=pipe,
    )


def _record_rank(rank: int, pipe: int, virtual: int, num_micro_batches: int) -> list[Event]:
    args = small_arguments(pipe, virtual, num_micro_batches)
    events: list[Event] = []
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=pipe)
    try:
        engine = MegatronEngine.for_training(args, Place.of(args, rank, rank, torch.device("cpu")), no_phases)
        with passes(engine, lambda *event: events.append(Event(*event))), _noted_messages(engine, rank, pipe, events):
            run(engine, num_micro_batches)
    finally:
        dist.destroy_process_group()
    return events


def run(engine: MegatronEngine, num_micro_batches: int) -> None:
    """Run the schedule of a step with the layers of `passes`; gradients are neither reduced nor applied."""
    engine.config.finalize_model_grads_func = None
    micro_batches: list[Any] = [{"number": number} for number in range(num_micro_batches)]
    engine._run(
        PipelineBatch(micro_batches, [None] * num_micro_batches, 1, engine.args.seq_length),
        lambda output, _: output.sum(),
        train=True,
    )


@contextmanager
def passes(engine: MegatronEngine, note: Any) -> Iterator[None]:
    """Replace layers by stubs that call `note("forward" or "backward", chunk, micro-batch)`."""
    first = torch.ones(engine.args.seq_length, 1, engine.args.hidden_size)

    def forward(chunk: Chunk, micro_batch: Any, documents: None) -> Tensor:
        place, given = chunk.vp_stage or 0, chunk._input
        note("forward", place, micro_batch["number"])
        weight = next(chunk.parameters()).view(-1)[0]
        output: Tensor = _Noted.apply((first if given is None else given) * weight, note, place, micro_batch["number"])
        return output

    with mock.patch.object(Chunk, "forward", forward):
        yield


class _Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, note: Any, chunk: int, micro_batch: int) -> Tensor:
        ctx.noted = note, chunk, micro_batch
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        note, chunk, micro_batch = ctx.noted
        note("backward", chunk, micro_batch)
        return gradient, None, None, None


@contextmanager
def _noted_messages(engine: MegatronEngine, rank: int, pipe: int, events: list[Event]) -> Iterator[None]:
    posted: dict[tuple[str, int], int] = defaultdict(int)
    kinds = {"hidden_out": ("hidden", 0), "gradient_out": ("gradient", 0)}
    kinds |= {"hidden_in": ("hidden", -1), "gradient_in": ("gradient", 1)}

    class Handle:
        def __init__(self, event: Event) -> None:
            self.event = event

        def wait(self) -> None:
            events.append(self.event._replace(what="wait"))

    def post(what: Literal["send", "receive"], name: str) -> Handle:
        kind, step = kinds[name]
        link = (kind, (rank + step) % pipe)
        event = Event(what, link=link, number=posted[link])
        posted[link] += 1
        events.append(event)
        return Handle(event)

    engine._communicator.links = SimpleNamespace(**{name: name for name in kinds})  # type: ignore[assignment]
    with (
        mock.patch.object(mcore_links, "_send", lambda tensor, name: post("send", name)),
        mock.patch.object(mcore_links, "_receive", lambda tensor, name: post("receive", name)),
    ):
        yield


# --- played


@dataclass(frozen=True)
class Played:
    """A replayed step: seconds from its first pass to its last, and compute seconds of each rank."""

    seconds: float
    busy: tuple[float, ...]

    @property
    def idle(self) -> float:
        """Fraction of the ranks' time spent waiting."""
        return 1.0 - sum(self.busy) / (len(self.busy) * self.seconds)


def play(orders: Sequence[Sequence[Event]], forward: float, backward: float, message: float = 0.0) -> Played:
    """Replay a step in which a pass takes `forward` or `backward` seconds and a message `message` seconds.

    DeadlockError if the ranks cannot finish, or if a link's ends disagree about the number of messages.
    """
    clocks, busy, at = [0.0] * len(orders), [0.0] * len(orders), [0] * len(orders)
    posted: dict[tuple[tuple[str, int], int], list[float]] = defaultdict(list)
    through: dict[tuple[tuple[str, int], int], float] = {}
    delivered: dict[tuple[str, int], int] = defaultdict(int)
    progress = True
    while progress:
        progress = False
        for rank, order in enumerate(orders):
            while at[rank] < len(order):
                event = order[at[rank]]
                message_end = (event.link, event.number)
                if event.what == "wait":
                    if message_end not in through:
                        break
                    clocks[rank] = max(clocks[rank], through[message_end])
                elif event.what in ("send", "receive"):
                    posted[message_end].append(clocks[rank])
                    _deliver(posted, through, delivered, event.link, message)
                else:
                    seconds = forward if event.what == "forward" else backward
                    clocks[rank] += seconds
                    busy[rank] += seconds
                at[rank] += 1
                progress = True
    stuck = [f"rank {rank} at {order[at[rank]]}" for rank, order in enumerate(orders) if at[rank] < len(order)]
    alone = [key for key, ends in posted.items() if len(ends) != 2]
    if stuck or alone:
        raise DeadlockError(f"ranks that wait: {'; '.join(stuck) or 'none'}; messages with one end: {alone[:4]}")
    return Played(max(clocks), tuple(busy))


def _deliver(
    posted: Any, through: Any, delivered: dict[tuple[str, int], int], link: tuple[str, int], message: float
) -> None:
    """Deliver all messages of a link that both ends have posted and whose predecessors have arrived."""
    number = delivered[link]
    while len(posted.get((link, number), ())) == 2:
        before = through.get((link, number - 1), 0.0)
        through[link, number] = max(*posted[link, number], before) + message
        number += 1
    delivered[link] = number
