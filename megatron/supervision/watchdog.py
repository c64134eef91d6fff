"""A run whose ranks die or hang ends in bounded time, and names them.

Two threads beside the training: one exchanges signs of life (`heartbeat`) and may block on the network; the other does
nothing that can block, and ends the process when there is a verdict. Verdicts are: a rank has given no sign of life for
`heartbeat_timeout_seconds`; a rank has made no progress for the limit of its phase (`step_timeout_minutes`, elsewhere
0.9 x `distributed_timeout_minutes`, so that the watchdog comes before the collectives give up); a rank has failed by
itself, and the others wait for it in a collective that does not end.

All times are those in which this process was running: a job that is suspended and resumed as a whole goes on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist

from megatron.neox_arguments import NeoXArgs
from megatron.parallel.place import Place
from megatron.supervision.failures import (
    FAILURE,
    LOST,
    LostRanks,
    Stopped,
    claim_loss,
    code_after,
    code_of_the_culprit,
    is_about_a_lost_peer,
    run_folder,
)
from megatron.supervision.status_store import Beat, Board, Whereabouts, beat_of, gather_titles, nodes_of

VICTIM_SECONDS = 10.0  # how long a rank may go on that waits for one which has failed by itself
RANKS_SHOWN = 8
TICK_SECONDS = 0.2
RANK_0_INTERVALS = 5  # beats that the others leave rank 0 to speak first


@dataclass(frozen=True)
class Verdict:
    """Why the run ends. `lost` are the ranks that are dead or did not arrive, none if nobody stands out; `own_error`:
    rank `by` has failed, and says so itself."""

    why: str
    lost: list[int]
    by: int
    own_error: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Watchdog:
    """Around a run: `with Watchdog(args, place) as watchdog: ...`. Collective. Progress is told to `whereabouts`."""

    def __init__(self, args: NeoXArgs, place: Place) -> None:
        self._awake_seconds = 0.0
        self.whereabouts = Whereabouts(self._awake)
        self.place, self.rank, self.world_size = place, place.rank, place.world_size
        self.silence = args.heartbeat_timeout_seconds
        self.step_limit = 60 * args.step_timeout_minutes
        self.other_limit = 60 * 0.9 * args.distributed_timeout_minutes
        self.interval = min(self.silence / 6, 1 + place.world_size / 500)
        self.log_dir = args.log_dir
        self.folder = run_folder(sys.argv[1:])
        self._main = threading.get_ident()
        self._let_go, self._end = threading.Event(), threading.Event()  # of the store; of the run
        self._verdict: Verdict | None = None
        self._answered = self._awake()  # when the store last answered
        self._disconnected = False
        self._dumped = False
        self._number = 0  # of the last beat

    def __enter__(self) -> Self:
        if not self.silence:
            return self
        self.board = Board.open(self.rank, gather_titles(self.place))
        self._exchanging = threading.Thread(target=self._exchange, daemon=True)
        self._exchanging.start()
        threading.Thread(target=self._guard, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.silence:
            return
        try:
            if error is None or isinstance(error, Stopped):
                self._end_together()
            elif isinstance(error, Exception) and is_about_a_lost_peer(error):
                self._name_the_lost(error)
            elif isinstance(error, Exception):
                with contextlib.suppress(RuntimeError):
                    self.board.publish(Verdict(f"{type(error).__name__}: {error}", [], self.rank, True).to_json())
        finally:
            self._let_go.set()
            self._end.set()

    def _end_together(self) -> None:
        """Rank 0 takes the store with it: first all ranks come to the end, then all of them let go of it."""
        self.whereabouts.at("the end")
        self.whereabouts.hurried = False
        dist.barrier()
        self._end.set()
        self._let_go.set()
        self._exchanging.join()
        dist.barrier()

    # --- the thread that talks to the store

    def _exchange(self) -> None:
        seen: dict[int, tuple[int, float]] = {}  # rank -> its last beat's number, and when that came
        while not self._let_go.wait(self.interval):
            self._number += 1
            try:
                self.board.beat(beat_of(self._number, self.whereabouts, self._main))
                if (text := self.board.verdict()) is not None:
                    self._verdict = self._verdict or Verdict(**json.loads(text))
                elif self._stuck():
                    self._accuse(self._hang(self.board.beats()))
                elif self.rank == 0 and (silent := self._silent(self.board.beats(), seen)):
                    self._accuse(silent)
            except RuntimeError:  # the store is gone, and rank 0 with it
                self._disconnected = True
                return
            self._answered = self._awake()

    def _awake(self) -> float:
        """Seconds that this process has been running for, counted by the guard; not those it was suspended."""
        return self._awake_seconds

    def _accuse(self, verdict: Verdict) -> None:
        self._dump()  # before anybody ends because of it
        self.board.publish(verdict.to_json())
        text = self.board.verdict()
        assert text is not None
        self._verdict = Verdict(**json.loads(text))

    def _stuck(self) -> bool:
        """Whether the main thread has made no progress for too long. Rank 0 comes first: thousands of ranks that all
        read everybody's beats would keep its store busy for minutes."""
        limit = self.step_limit if self.whereabouts.hurried else self.other_limit
        return self.whereabouts.seconds > limit + (0 if self.rank == 0 else RANK_0_INTERVALS * self.interval)

    def _silent(self, beats: list[Beat], seen: dict[int, tuple[int, float]]) -> Verdict | None:
        now, lost = self._awake(), []
        for rank, beat in enumerate(beats):
            if rank not in seen or seen[rank][0] != beat.number:
                seen[rank] = (beat.number, now)
            elif now - seen[rank][1] > self.silence:
                lost.append(rank)
        return self._gone(lost, beats, f"no sign of life for {self.silence:.0f} s") if lost else None

    def _gone(self, lost: list[int], beats: list[Beat], what: str) -> Verdict:
        named = [f"{self.board.name(rank)}: {what}, last seen {beats[rank].told()}" for rank in lost[:RANKS_SHOWN]]
        return Verdict(f"{_many(lost)} lost: " + "; ".join(named) + _more(lost), lost, self.rank)

    def _hang(self, beats: list[Beat]) -> Verdict:
        """Of ranks that are all alive: those that are not in a collective keep the others waiting."""
        where = self.whereabouts
        what = f"no progress for {where.seconds:.0f} s in {where.phase} of iteration {where.iteration}"
        absent = [rank for rank, beat in enumerate(beats) if not beat.waits]
        lost = absent if 0 < len(absent) < self.world_size else []
        if not lost:
            first = min(range(self.world_size), key=lambda rank: (beats[rank].iteration, -beats[rank].seconds))
            why = f"{what}; all ranks wait, none stands out; longest of all {self.board.name(first)}, "
            return Verdict(why + beats[first].told(), [], self.rank)
        named = [f"{self.board.name(rank)}, {beats[rank].told()}" for rank in lost[:RANKS_SHOWN]]
        return Verdict(f"{what}; {_many(lost)} did not arrive: " + "; ".join(named) + _more(lost), lost, self.rank)

    # --- the thread that ends the process

    def _guard(self) -> None:
        tick = time.monotonic()
        while not self._end.wait(TICK_SECONDS):
            before, tick = tick, time.monotonic()
            self._awake_seconds += min(tick - before, 5 * TICK_SECONDS)
            unanswered = self._awake() - self._answered
            if unanswered > self.silence + 3 * self.interval:
                self._execute(self._without_rank_0(f"its store has not answered for {unanswered:.0f} s"))
            if self._let_go.is_set():
                continue  # the main thread is ending, in order or with the lost ranks' names
            if self._disconnected and self._verdict is None:
                if self._let_go.wait(2 * self.interval + 1):  # it may have noticed as well
                    continue
                self._verdict = self._without_rank_0("it has ended")
            if self._verdict is not None:
                self._execute(self._verdict)

    def _without_rank_0(self, what: str) -> Verdict:
        return Verdict(f"1 rank lost: {self.board.name(0)}: {what}", [0], self.rank)

    def _execute(self, verdict: Verdict) -> None:
        if verdict.own_error:
            if self._let_go.wait(VICTIM_SECONDS):
                return
            os._exit(code_of_the_culprit(self.folder) or FAILURE)
        self._dump()
        lost = self._error(verdict)
        first = claim_loss(self.folder, lost)
        if first:
            print(f"stopped: {lost}", file=sys.stderr, flush=True)
        self._linger()
        os._exit(LOST if first else code_after(self.folder))

    def _error(self, verdict: Verdict) -> LostRanks:
        where = f"; stacks in {self._stacks()}" if self.log_dir else ""
        return LostRanks(verdict.why + where, nodes_of(verdict.lost, self.board.titles), verdict.by == self.rank)

    def _linger(self) -> None:
        """All read the verdict and write their stacks before one of them ends; rank 0 serves the store longest."""
        time.sleep((4 if self.rank == 0 else 2) * self.interval)

    def _stacks(self) -> Path:
        return Path(self.log_dir or ".") / "stacks"

    def _dump(self) -> None:
        """Where every thread of this process is, for people; once, before the others' end changes it."""
        if not self.log_dir or self._dumped:
            return
        self._dumped = True
        with contextlib.suppress(OSError):
            self._stacks().mkdir(parents=True, exist_ok=True)
            with (self._stacks() / f"rank_{self.rank}.txt").open("w") as file:
                file.write(f"{self.board.name(self.rank)}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)

    # --- the main thread, after it lost a peer

    def _name_the_lost(self, error: Exception) -> None:
        """Raise LostRanks for the ranks that do not beat any more; return if there is another reason.

        A dead peer is noticed by its neighbours within milliseconds, by its missing beats within a few intervals.
        """
        self._let_go.set()
        self._exchanging.join()
        try:
            if self.rank != 0:
                self._beat_on(RANK_0_INTERVALS)
            if self._verdict is None:
                before = self.board.beats()
                self._beat_on(RANK_0_INTERVALS - 1)
            if self._verdict is None:
                after = self.board.beats()
                lost = [r for r in range(self.world_size) if r != self.rank and before[r].number == after[r].number]
                if not lost:
                    return
                self._accuse(self._gone(lost, after, "gone"))
        except RuntimeError:
            self._verdict = self._verdict or self._without_rank_0("it has ended")
        assert self._verdict is not None
        if self._verdict.own_error:
            return  # the rank that failed has said so
        self._dump()
        self._linger()
        raise self._error(self._verdict) from error

    def _beat_on(self, intervals: int) -> None:
        """Give signs of life for a while, or until there is a verdict."""
        deadline = time.monotonic() + intervals * self.interval
        while self._verdict is None and time.monotonic() < deadline:
            self._number += 1
            self.board.beat(beat_of(self._number, self.whereabouts, self._main))
            self._answered = self._awake()
            if (text := self.board.verdict()) is not None:
                self._verdict = Verdict(**json.loads(text))
            time.sleep(self.interval / 2)


def _many(ranks: list[int]) -> str:
    return "1 rank" if len(ranks) == 1 else f"{len(ranks)} ranks"


def _more(ranks: list[int]) -> str:
    return f" and {len(ranks) - RANKS_SHOWN} more" if len(ranks) > RANKS_SHOWN else ""
