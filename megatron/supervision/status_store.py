"""Heartbeats: every few seconds each rank writes its position to a store that rank 0 serves.

The store does not depend on the collectives: it works while all of them hang. If rank 0 ends, the others notice at
once; if it freezes, after a while.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch.distributed as dist

from megatron.common.log import EVERY_RANK
from megatron.parallel.collective_errors import gather_by_rank
from megatron.parallel.place import Place
from megatron.parallel.rank_env import node_name
from megatron.supervision.authenticated_store import AuthenticatedStore

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[2]
# A rank with a stack frame in one of these files is waiting for others.
_WAITING_IN = ("/torch/distributed/", "/deepspeed/comm/", "/megatron/engine/mcore_links.py")
# What faulthandler writes: a line for each thread, then one for each of its frames.
_THREAD = re.compile(r"(?:Current thread|Thread) 0x(?P<ident>[0-9a-f]+)")
_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in ')


@dataclass
class Whereabouts:
    """Where the main thread is. It writes, the watchdog's threads read; plain assignments need no lock."""

    clock: Callable[[], float] = time.monotonic
    phase: str = "start-up"
    iteration: int = 0
    under_step_timeout: bool = False  # whether the time limit of a training step applies
    since: float = field(init=False)

    def __post_init__(self) -> None:
        self.since = self.clock()

    def at(self, phase: str) -> None:
        """Record that the main thread has reached `phase`, which counts as progress."""
        self.phase, self.since = phase, self.clock()

    @property
    def seconds(self) -> float:
        """Time since the last progress."""
        return self.clock() - self.since


@dataclass(frozen=True)
class Beat:
    """A rank's own position. `waits`: it is inside a collective, so it has arrived."""

    number: int
    phase: str
    iteration: int
    seconds: float
    waits: bool
    line: str

    def position(self) -> str:
        """`in data of iteration 12 at megatron/data/sampler.py:80 for 100 s`."""
        line = f" at {self.line}" if self.line else ""
        return f"in {self.phase} of iteration {self.iteration}{line} for {self.seconds:.0f} s"


def current_beat(number: int, whereabouts: Whereabouts, main: int) -> Beat:
    """The current heartbeat of this process; `main` is the identifier of its main thread."""
    stacks = thread_stacks()
    # On a GPU autograd runs backward functions in threads of its own: any thread but this one may be in a collective.
    own = threading.get_ident()
    waits = any(_waits(stack) for thread, stack in stacks.items() if thread != own)
    line = _line(stacks.get(main, []))
    return Beat(number, whereabouts.phase, whereabouts.iteration, round(whereabouts.seconds, 1), waits, line)


def thread_stacks() -> dict[int, list[tuple[str, int]]]:
    """(file, line) of every frame of every thread, innermost first, by the thread's identifier.

    faulthandler reads them without creating frame objects. `sys._current_frames` and `f_back` create them while the
    other threads run on, which crashed ranks under CPython 3.11 (segmentation faults in PyFrame_GetBack).
    """
    with open(os.memfd_create("stacks"), "w+", encoding="utf-8", errors="replace") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        text = file.read()
    stacks: dict[int, list[tuple[str, int]]] = {}
    stack: list[tuple[str, int]] = []
    for line in text.splitlines():
        if thread := _THREAD.match(line):
            stack = stacks[int(thread["ident"], 16)] = []
        elif frame := _FRAME.match(line):
            stack.append((frame["file"], int(frame["line"])))
    return stacks


def _waits(stack: Sequence[tuple[str, int]]) -> bool:
    return any(part in file for file, _ in stack[:8] for part in _WAITING_IN)


def _line(stack: Sequence[tuple[str, int]]) -> str:
    """The innermost line of this project."""
    for file, number in stack:
        path = Path(file)
        if path.is_relative_to(_ROOT) and ".venv" not in path.parts:
            return f"{path.relative_to(_ROOT)}:{number}"
    return ""


class StatusStore:
    """The last heartbeat of every rank, and at most one verdict."""

    def __init__(self, store: AuthenticatedStore, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self._known: dict[int, Beat] = {}

    @classmethod
    def open(cls, place: Place) -> StatusStore:
        """Serve the store on rank 0, connect to it on the others. Collective over the default group."""
        host = None if on_one_machine(place) else os.environ.get("MASTER_ADDR")
        opened = cls(AuthenticatedStore.open(place, host, _report), place.rank, place.world_size)
        opened.beat(Beat(0, "start-up", 0, 0.0, False, ""))
        dist.barrier()  # from here on every rank has a heartbeat in the store
        return opened

    @property
    def ignored(self) -> int:
        """Number of messages from outside this run that this rank has read."""
        return self.store.ignored

    def beat(self, beat: Beat) -> None:
        self.store.set(f"beat/{self.rank}", json.dumps(asdict(beat)))

    def beats(self) -> list[Beat]:
        """The last heartbeat of every rank, by rank; if a rank's last one is not authentic, the one before it."""
        found = self.store.get([f"beat/{rank}" for rank in range(self.world_size)])
        for rank, text in enumerate(found):
            beat = Beat(0, "start-up", 0, 0.0, False, "") if text is None else Beat(**json.loads(text))
            known = self._known.get(rank)
            if known is None or beat.number > known.number:  # a replayed old heartbeat is not a sign of life
                self._known[rank] = beat
        return [self._known[rank] for rank in range(self.world_size)]

    def verdict(self) -> str | None:
        """The first text published by any rank, None if there is none."""
        return self.store.get(["verdict"])[0] if self.store.has("verdict") else None

    def publish(self, verdict: str) -> bool:
        """Publish a verdict; returns whether it is the first."""
        return self.store.set_first("verdict", verdict)


def _report(line: str) -> None:
    logger.warning(line, extra=EVERY_RANK)


def on_one_machine(place: Place) -> bool:
    """Whether all ranks share this machine. Collective over the default group."""
    own = (socket.gethostname(), _boot())
    everywhere = [own] * place.world_size
    dist.all_gather_object(everywhere, own)
    return len(set(everywhere)) == 1


def _boot() -> str:
    """Machines may share a hostname, and a separate network namespace counts as a separate machine here."""
    parts = []
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/net"))
    return " ".join(parts)


def titled(rank: int, titles: Sequence[str]) -> str:
    """`rank 5 on n2 (pipe 1, data 0, tensor 1)`."""
    return f"rank {rank} on {titles[rank]}"


def nodes_of(ranks: Iterable[int], titles: Sequence[str]) -> list[str]:
    """The nodes of some ranks, sorted, each once."""
    return sorted({titles[rank].partition(" ")[0] for rank in ranks})


def gather_titles(place: Place) -> list[str]:
    """By rank, "node (pipe p, data d, tensor t)". Collective over the default group."""
    return gather_by_rank(
        f"{node_name(os.environ)} (pipe {place.pp_rank}, data {place.dp_rank}, tensor {place.tp_rank})"
    )
