"""Signs of life: each rank tells a store of its own, every second or few, where it is.

The store is apart from the collectives: it works while all of them hang. Rank 0 serves it, so its own end is noticed by
everybody at once, its standstill after a while.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch.distributed as dist
from torch.distributed import TCPStore

from megatron.parallel.place import Place
from megatron.parallel.rank_env import node_name

CONNECT_SECONDS = 60
_ROOT = Path(__file__).resolve().parents[2]
_WAITING_IN = ("/torch/distributed/", "/deepspeed/comm/")  # a frame here: the rank waits for others


@dataclass
class Whereabouts:
    """Where the main thread is. It writes, the watchdog's threads read; assignments need no lock."""

    clock: Callable[[], float] = time.monotonic
    phase: str = "start-up"
    iteration: int = 0
    hurried: bool = False  # whether the limit of a training step holds
    since: float = field(init=False)

    def __post_init__(self) -> None:
        self.since = self.clock()

    def at(self, phase: str) -> None:
        """The main thread has come to `phase`: progress."""
        self.phase, self.since = phase, self.clock()

    @property
    def seconds(self) -> float:
        """Time since the last progress."""
        return self.clock() - self.since


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself. `waits`: it is inside a collective, that is, it has arrived there."""

    number: int
    phase: str
    iteration: int
    seconds: float
    waits: bool
    line: str

    def told(self) -> str:
        place = f" at {self.line}" if self.line else ""
        return f"in {self.phase} of iteration {self.iteration}{place} for {self.seconds:.0f} s"


def beat_of(number: int, whereabouts: Whereabouts, main: int) -> Beat:
    """The present beat of this process; `main` is the identifier of its main thread."""
    frames = sys._current_frames()
    # Autograd runs backward functions in threads of its own on a GPU: any thread may be the one that waits.
    own = threading.get_ident()
    waits = any(_waits(frame) for thread, frame in frames.items() if thread != own)
    line = _line(frames.get(main))
    return Beat(number, whereabouts.phase, whereabouts.iteration, round(whereabouts.seconds, 1), waits, line)


def _frames(frame: FrameType | None) -> list[FrameType]:
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _waits(frame: FrameType | None) -> bool:
    return any(part in inner.f_code.co_filename for inner in _frames(frame)[:8] for part in _WAITING_IN)


def _line(frame: FrameType | None) -> str:
    """The innermost line of this project."""
    for inner in _frames(frame):
        path = Path(inner.f_code.co_filename)
        if path.is_relative_to(_ROOT) and ".venv" not in path.parts:
            return f"{path.relative_to(_ROOT)}:{inner.f_lineno}"
    return ""


class Board:
    """The store: beats by rank, who the ranks are, and one verdict."""

    def __init__(self, store: TCPStore, rank: int, titles: list[str]) -> None:
        self.store, self.rank, self.titles = store, rank, titles

    @classmethod
    def open(cls, rank: int, titles: list[str]) -> Board:
        """Collective over the default group. `titles` name all ranks to people (`gather_titles`)."""
        box: list[tuple[str, int] | None] = [None]
        store = None
        if rank == 0:
            store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            here = "127.0.0.1" if "NEOX_RENDEZVOUS" in os.environ else os.environ.get("MASTER_ADDR", "127.0.0.1")
            box = [(here, store.port)]
        dist.broadcast_object_list(box, src=0)
        if store is None:
            assert box[0] is not None
            host, port = box[0]
            store = TCPStore(host, port, wait_for_workers=False, timeout=timedelta(seconds=CONNECT_SECONDS))
        board = cls(store, rank, titles)
        board.beat(Beat(0, "start-up", 0, 0.0, False, ""))
        dist.barrier()  # now every rank has a beat
        return board

    def beat(self, beat: Beat) -> None:
        self.store.set(f"beat/{self.rank}", json.dumps(asdict(beat)))

    def beats(self) -> list[Beat]:
        """The last beat of every rank."""
        found = self.store.multi_get([f"beat/{rank}" for rank in range(len(self.titles))])
        return [Beat(**json.loads(text)) for text in found]

    def verdict(self) -> str | None:
        """What some rank has published, None if none has."""
        return self.store.get("verdict").decode() if self.store.check(["verdict"]) else None

    def publish(self, verdict: str) -> bool:
        """Whether this verdict is the first."""
        return self.store.compare_set("verdict", "", verdict).decode() == verdict

    def name(self, rank: int) -> str:
        return titled(rank, self.titles)


def titled(rank: int, titles: list[str]) -> str:
    """`rank 5 on n2 (pipe 1, data 0, tensor 1)`."""
    return f"rank {rank} on {titles[rank]}"


def nodes_of(ranks: Iterable[int], titles: list[str]) -> list[str]:
    """The nodes of some ranks, sorted, each once."""
    return sorted({titles[rank].partition(" ")[0] for rank in ranks})


def gather_titles(place: Place) -> list[str]:
    """By rank, "node (pipe p, data d, tensor t)". Collective over the default group."""
    mine = f"{node_name(os.environ)} (pipe {place.pp_rank}, data {place.dp_rank}, tensor {place.tp_rank})"
    titles = [mine] * place.world_size
    dist.all_gather_object(titles, mine)
    return titles
