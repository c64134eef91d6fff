"""Background saves: copy the state to host memory, continue training, and write the files from a thread of each rank.

A save is three jobs: all ranks write their files, rank 0 publishes the checkpoint, rank 0 thins out older ones; if a
rank fails, rank 0 removes the partial folder instead. Each job runs on a thread of its rank. **The threads do not
communicate.** Whether a job is over on all ranks, and what went wrong, the main threads find out in `poll`, which every
rank calls after every step: an all-reduce of one number, only while a save is in flight. So all collectives of a rank
are called by one thread, and in the same order on all ranks, because the result of each decides whether the next is
called: nothing can deadlock, with 2,048 ranks no more than with two, and training's communicator is the only one
needed. (A collective from the writing thread would be ordered against training's by chance, which NCCL and RCCL do not
allow on one communicator, and which can deadlock two communicators that share a GPU; a second world-wide gloo group
would be a mesh of two million sockets.) The cost: publishing begins at the end of the step in which the last file was
written.

A thread and not a process: forking a rank that holds GPU contexts and registered network memory is not safe, and a
process could outlive its rank and write into the folder of the next job. Nor would it disturb training less: torch
writes, computes checksums and syncs with the interpreter lock released, and a plain Python loop beside the writing of
0.5 GiB made 1.2 to 1.3 million iterations per second of CPU time, whether a thread or a process wrote.
`benchmarks/saving.py` measures what training loses.

One save is in flight at a time, so a rank holds one copy of its state and the disk one partial folder. A save that
falls due earlier waits for the previous one, and logs how long.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron.checkpoint.rank_files import HostCopies, rank_contents, tensor_bytes
from megatron.checkpoint.save import CheckpointWriter
from megatron.checkpoint.state import TrainState
from megatron.common.errors import CheckpointError
from megatron.parallel.collective_errors import RankGroup

if TYPE_CHECKING:
    from megatron.engine.protocol import Engine
    from megatron.neox_arguments import NeoXArgs

logger = logging.getLogger(__name__)

_Then = Callable[["_Flight"], None]  # what the main threads do when a job has succeeded on all ranks
_Job = tuple[Callable[[], None], _Then | None]

PAUSE_SECONDS = 0.02  # between polls while waiting for a save to end
QUESTIONS_A_REPORT = 3000  # polls between log lines while waiting; about a minute


class BackgroundSaver:
    """Runs the saves of a training run in the background. All ranks call the same methods in the same order.

    `completed` is the iteration of the last checkpoint that is complete on disk.
    """

    def __init__(
        self,
        engine: Engine,
        args: NeoXArgs,
        data_fingerprints: Mapping[str, Any],
        completed: int | None = None,
    ) -> None:
        self.engine, self.args, self.data_fingerprints = engine, args, data_fingerprints
        self.completed = completed
        self.ranks = RankGroup.world(engine.place.device)
        self.copies = HostCopies()
        self._flight: _Flight | None = None

    @property
    def in_flight(self) -> bool:
        return self._flight is not None

    def prepare(self) -> None:
        """Allocate the buffers, so that a lack of memory shows before the first step, and log their size.

        Collective; CheckpointError on all ranks if one lacks the memory.
        """
        own = 0
        with self.ranks.together("async_save: making room for copies in host memory"):
            writer = self._writer(TrainState())
            contents = rank_contents(self.engine, self.args, writer.state)
            own = tensor_bytes(self.copies.snapshot(contents))
        largest, total = self.ranks.largest(own), self.ranks.total(own)
        logger.info(
            f"async_save: {total / 1e9:.3g} GB are copied to host memory at each save, at most {largest / 1e9:.3g} GB "
            "on a rank"
        )

    def begin(self, state: TrainState) -> None:
        """Copy the current state and start writing it. Collective.

        Waits for a save in flight first. A failure, now or later, is logged on rank 0 and never raised.
        """
        if self._flight is not None:
            start, before = time.perf_counter(), self._flight.writer.final.name
            self.wait()
            logger.info(
                f"iteration {state.iteration}: training waited {time.perf_counter() - start:.2f} s until {before} was "
                "written: saves are due faster than the file system takes them"
            )
        flight = _Flight(self._writer(state))
        writer = flight.writer
        try:
            with self.ranks.together(writer.what):
                writer.open()
            with self.ranks.together(writer.what):
                contents = rank_contents(self.engine, self.args, writer.state)
                snapshot = self.copies.snapshot(contents)
        except CheckpointError as error:
            self._give_up(flight, error)
        else:
            write = partial(writer.write, snapshot)
            flight.start((write, None), (writer.publish, self._say_saved), (writer.thin_out, None))
        flight.blocked = time.perf_counter() - flight.begun
        self._flight = flight

    def poll(self) -> None:
        """Advance the save in flight if its job has ended on all ranks. Collective; waits only for the ranks' calls."""
        flight = self._flight
        if flight is None or self.ranks.total(flight.running):
            return
        try:
            self.ranks.agree(flight.writer.what, flight.error)
        except CheckpointError as error:
            self._give_up(flight, error)
            return
        if flight.then is not None:
            flight.then(flight)
        if not flight.start_next():
            self._flight = None

    def wait(self) -> None:
        """Block until no save is in flight. Collective. Ranks that keep the others waiting are logged every minute."""
        questions = 0
        while self._flight is not None:
            time.sleep(PAUSE_SECONDS)
            questions += 1
            if questions % QUESTIONS_A_REPORT == 0:
                still = self.ranks.where(self._flight.running)
                logger.info(f"waiting for {self._flight.writer.final.name}: {still} still writing")
            self.poll()

    def _writer(self, state: TrainState) -> CheckpointWriter:
        return CheckpointWriter(self.engine, self.args, state, self.data_fingerprints)

    def _say_saved(self, flight: _Flight) -> None:
        self.completed = flight.writer.state.iteration
        logger.info(
            f"saved {flight.writer.final}: training waited {flight.blocked:.2f} s, written in the background in "
            f"{time.perf_counter() - flight.begun:.1f} s"
        )

    def _give_up(self, flight: _Flight, error: CheckpointError) -> None:
        last = "there is none yet" if self.completed is None else f"the last one is of iteration {self.completed}"
        logger.warning(f"{error}. The run goes on without this checkpoint ({last}); the next save tries again")
        flight.start((flight.writer.discard, None))


class _Flight:
    """A save in flight: the job on this rank's thread, and the jobs that follow it."""

    def __init__(self, writer: CheckpointWriter) -> None:
        self.writer = writer
        self.begun, self.blocked = time.perf_counter(), 0.0
        self.error: BaseException | None = None
        self.then: _Then | None = None
        self._jobs: list[_Job] = []
        self._thread: threading.Thread | None = None

    def start(self, *jobs: _Job) -> None:
        """Replace all remaining jobs with these, and start the first."""
        self._jobs = list(jobs)
        self.start_next()

    def start_next(self) -> bool:
        """Start the next job; False if none is left."""
        if not self._jobs:
            return False
        job, self.then = self._jobs.pop(0)
        self.error = None
        # Daemon: a rank that must exit does not wait for a file system that hangs.
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()
        return True

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # `poll` reports it to all ranks
            self.error = error
