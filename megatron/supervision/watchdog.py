"""Ends a run whose ranks die or hang within bounded time, and names them.

Two threads run in the background of the training. One exchanges heartbeats (`status_store`), evaluates them with
`hang_diagnosis`, and may block on the network. The other does nothing that can block, and ends the process once there
is a verdict: a rank has sent no heartbeat for `heartbeat_timeout_seconds`; a rank has made no progress for the time
limit of its phase; a rank has failed by itself, and the others wait for it in a collective that does not end.

Time is counted only while this process runs, so that a job that is suspended and resumed as a whole continues.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import torch.distributed as dist

from megatron.common.log import EVERY_RANK
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.place import Place
from megatron.supervision.failures import (
    FAILURE,
    LOST,
    Stopped,
    claim_failure,
    claim_loss,
    code_after,
    code_of_first_failure,
    is_about_a_lost_peer,
    reported_by_launcher,
    run_folder,
)
from megatron.supervision.hang_diagnosis import (
    RANK_0_HEAD_START,
    Arrivals,
    Limits,
    RunVerdict,
    hang_verdict,
    is_stuck,
    lost_verdict,
    no_heartbeat,
    rank_0_verdict,
    silent_ranks,
    with_arrivals,
)
from megatron.supervision.status_store import Beat, StatusStore, Whereabouts, current_beat, gather_titles, titled

logger = logging.getLogger(__name__)

VICTIM_SECONDS = 10.0  # how long a rank may keep waiting for one that has failed with an error
TICK_SECONDS = 0.2  # of the thread that ends the process


class Watchdog:
    """Around a run: `with Watchdog(args, place) as watchdog: ...`. Collective. The run reports to `whereabouts`."""

    def __init__(self, args: NeoXArgs, place: Place) -> None:
        self._awake_seconds = 0.0
        self.whereabouts = Whereabouts(self._awake)
        self.place, self.rank = place, place.rank
        self.limits = Limits.of_run(args, place.world_size)
        self.stacks = Path(args.log_dir) / "stacks" if args.log_dir else None
        self.folder = run_folder(sys.argv[1:])
        self._main_thread = threading.get_ident()
        self._store_released, self._run_ended = threading.Event(), threading.Event()
        self._verdict: RunVerdict | None = None
        self._answered = self._awake()  # when the store last answered
        self._disconnected = False
        self._broken: str | None = None  # why the exchanging thread has ended early
        self._stacks_written = False
        self._beats_sent = 0

    def __enter__(self) -> Self:
        if not self.limits.silence:
            return self
        self.titles = gather_titles(self.place)
        self.store = StatusStore.open(self.place)
        self._exchanging = threading.Thread(target=self._exchange, daemon=True)
        self._exchanging.start()
        threading.Thread(target=self._guard, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.limits.silence:
            return
        try:
            if error is None or isinstance(error, Stopped):
                self._end_together()
            elif isinstance(error, Exception) and is_about_a_lost_peer(error):
                self._name_the_lost(error)
            elif isinstance(error, Exception):
                failed = RunVerdict(f"{type(error).__name__}: {error}", [], self.rank, own_error=True)
                with contextlib.suppress(RuntimeError):
                    self.store.publish(failed.to_json())
        finally:
            self._store_released.set()
            self._run_ended.set()

    def _end_together(self) -> None:
        """The store closes when rank 0 ends: all ranks arrive first, then all release it, then they end."""
        self.whereabouts.at("the end")
        self.whereabouts.under_step_timeout = False
        dist.barrier()
        self._run_ended.set()
        self._store_released.set()
        self._exchanging.join()
        if self.store.ignored:
            logger.warning(
                f"watchdog: {self.store.ignored} messages from outside this run were ignored", extra=EVERY_RANK
            )
        dist.barrier()

    # --- the thread that talks to the store

    def _exchange(self) -> None:
        """A failure of this thread must not leave the run unprotected: it ends the run, with its reason."""
        try:
            self._exchange_until_released()
        except Exception as error:
            self._broken = f"{type(error).__name__}: {error}"

    def _exchange_until_released(self) -> None:
        arrivals: Arrivals = {}
        while not self._store_released.wait(self.limits.interval):
            try:
                self._send_beat()
                if self._verdict is None and is_stuck(self.whereabouts, self.limits, self.rank):
                    self._publish(hang_verdict(self.store.beats(), self.whereabouts, self.titles, self.rank))
                elif self._verdict is None and self.rank == 0:
                    beats = self.store.beats()
                    arrivals = with_arrivals(arrivals, beats, self._awake())
                    self._publish_silence(silent_ranks(arrivals, self._awake(), self.limits), beats)
            except RuntimeError:  # the store is gone, and rank 0 with it
                self._disconnected = True
                return
            self._answered = self._awake()

    def _send_beat(self) -> None:
        """Write a heartbeat, and read the verdict if another rank has published one."""
        self._beats_sent += 1
        self.store.beat(current_beat(self._beats_sent, self.whereabouts, self._main_thread))
        if (text := self.store.verdict()) is not None:
            self._verdict = self._verdict or RunVerdict.from_json(text)

    def _publish_silence(self, silent: list[int], beats: list[Beat]) -> None:
        if silent:
            what = f"no sign of life for {self.limits.silence:.0f} s"
            self._publish(lost_verdict(silent, what, beats, self.titles, self.rank))

    def _publish(self, verdict: RunVerdict) -> None:
        """Publish a verdict, unless another rank was faster; either way `_verdict` becomes the first one."""
        self._write_stacks()  # before other ranks end because of it
        self.store.publish(verdict.to_json())
        text = self.store.verdict()
        assert text is not None
        self._verdict = RunVerdict.from_json(text)

    def _awake(self) -> float:
        """Seconds for which this process has been running, excluding those in which it was suspended."""
        return self._awake_seconds

    # --- the thread that ends the process

    def _guard(self) -> None:
        try:
            self._guard_until_the_end()
        except Exception as error:
            self._end_unprotected(f"{type(error).__name__}: {error}")

    def _end_unprotected(self, why: str) -> NoReturn:
        """A thread of the watchdog has failed, so that nothing would notice a hang: end this process and report why."""
        text = f"the watchdog of {titled(self.rank, self.titles)} failed, and the run would continue unprotected: {why}"
        if claim_failure(self.folder, FAILURE, text) and not reported_by_launcher(sys.argv[1:]):
            print(f"stopped: {text}", file=sys.stderr, flush=True)
        os._exit(FAILURE)

    def _guard_until_the_end(self) -> None:
        tick = time.monotonic()
        while not self._run_ended.wait(TICK_SECONDS):
            before, tick = tick, time.monotonic()
            self._awake_seconds += min(tick - before, 5 * TICK_SECONDS)  # a longer tick was a suspension
            if self._broken is not None and not self._store_released.is_set():
                self._end_unprotected(self._broken)
            unanswered = self._awake() - self._answered
            if unanswered > self.limits.silence + 3 * self.limits.interval:
                what = f"its store has not answered for {unanswered:.0f} s"
                self._end_process(rank_0_verdict(what, self.titles, self.rank))
            if self._store_released.is_set():
                continue  # the main thread is ending, either normally or with the lost ranks' names
            if self._disconnected and self._verdict is None:
                if self._store_released.wait(2 * self.limits.interval + 1):  # the main thread may have noticed as well
                    continue
                self._verdict = rank_0_verdict("it has ended", self.titles, self.rank)
            if self._verdict is not None:
                self._end_process(self._verdict)

    def _end_process(self, verdict: RunVerdict) -> None:
        """End this process because of a verdict; returns only if the main thread ends by itself."""
        if verdict.own_error:
            if self._store_released.wait(VICTIM_SECONDS):
                return
            os._exit(code_of_first_failure(self.folder) or FAILURE)
        self._write_stacks()
        error = verdict.as_error(self.titles, self.rank, self.stacks)
        first = claim_loss(self.folder, error)
        if first and not reported_by_launcher(sys.argv[1:]):
            print(f"stopped: {error}", file=sys.stderr, flush=True)
        self._linger()
        os._exit(LOST if first else code_after(self.folder))

    def _linger(self) -> None:
        """Let all ranks read the verdict and write their stacks; rank 0 serves the store, so it ends last."""
        time.sleep((4 if self.rank == 0 else 2) * self.limits.interval)

    def _write_stacks(self) -> None:
        """Write the stacks of all threads of this process, once, before the end of other ranks changes them."""
        if self.stacks is None or self._stacks_written:
            return
        self._stacks_written = True
        with contextlib.suppress(OSError):
            self.stacks.mkdir(parents=True, exist_ok=True)
            with (self.stacks / f"rank_{self.rank}.txt").open("w") as file:
                file.write(f"{titled(self.rank, self.titles)}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)

    # --- the main thread, after it lost a peer

    def _name_the_lost(self, error: Exception) -> None:
        """Raise LostRanks for the ranks that no longer send heartbeats; return if there is another reason.

        The neighbors of a dead rank notice within milliseconds, but missing heartbeats show only after a few intervals.
        """
        self._store_released.set()
        self._exchanging.join()
        try:
            if self.rank != 0:
                self._beat_on(RANK_0_HEAD_START)
            if self._verdict is None:
                before = self.store.beats()
                self._beat_on(RANK_0_HEAD_START - 1)
            if self._verdict is None:
                after = self.store.beats()
                lost = no_heartbeat(after, before, self.rank)
                if not lost:
                    return
                self._publish(lost_verdict(lost, "gone", after, self.titles, self.rank))
        except RuntimeError:
            self._verdict = self._verdict or rank_0_verdict("it has ended", self.titles, self.rank)
        assert self._verdict is not None
        if self._verdict.own_error:
            return  # the rank that failed has reported it
        self._write_stacks()
        self._linger()
        raise self._verdict.as_error(self.titles, self.rank, self.stacks) from error

    def _beat_on(self, intervals: int) -> None:
        """Send heartbeats for a number of intervals, or until there is a verdict."""
        deadline = time.monotonic() + intervals * self.limits.interval
        while self._verdict is None and time.monotonic() < deadline:
            self._send_beat()
            self._answered = self._awake()
            time.sleep(self.limits.interval / 2)
