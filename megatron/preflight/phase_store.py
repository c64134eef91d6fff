"""A board in rank 0's store on which every rank writes that it has come to a phase, and what came out of it.

A collective that hangs cannot say so. Here nobody has to: a thread of rank 0 reads the board and knows, when the time
of a phase is up, who has not come and who has not finished; a thread of every other rank waits for its word and ends
the process, whatever the main thread is stuck in.
"""

from __future__ import annotations

import faulthandler
import json
import os
import queue
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from megatron.common.errors import UserError
from megatron.parallel.rank_env import Ranks
from megatron.preflight.diagnosis import CONFIGURATION, STALLED, Failure, Group, Roster, failure

MARGIN_SECONDS = 10.0  # how much longer than a phase may take a rank waits for rank 0's word
GOODBYE_SECONDS = 3.0  # how long rank 0 stays for the others to read its last word
AFTER_AN_ERROR_SECONDS = 3.0  # how long the others have to finish once one rank has failed
_LOOK_SECONDS = 0.05  # between two looks of rank 0 at its own store
_RETRY_SECONDS, _CONNECT_SECONDS = 0.2, 5.0  # of a rank that looks for rank 0
_LONGEST = 200  # characters of an error's text


class Board:
    """One rank's access to the board. `timeout`, in seconds, is for each phase."""

    def __init__(self, started: Ranks, env: Mapping[str, str], roster: Roster, timeout: float) -> None:
        """Connect. A rank 0 that does not come within the timeout ends the process with STALLED."""
        self.roster, self.timeout = roster, timeout
        self._rank, self._world, self._speaks = started.rank, started.world_size, started.local_rank == 0
        self._phase, self._name, self._finished = 0, "the start", False
        self._passed: queue.Queue[None] = queue.Queue()
        self._results: list[Any] = []
        _allow_open_files()
        host, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
        serves = self._rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            # A connection serves one call at a time, and the second thread's call waits.
            stores = [_connect(host, port, self._world, serve, timeout) for serve in (serves, False)]
        except (RuntimeError, OSError) as error:
            self._leave(
                STALLED,
                f"preflight: FAILED at the start: rank 0 on {roster.node(0)} did not arrive within {timeout:.0f} s, it "
                f"should listen at {host}:{port}; says rank {self._rank} on {roster.node(self._rank)} "
                f"({_first_line(error)})",
            )
        prefix = f"preflight{env.get('TORCHELASTIC_RESTART_COUNT', '')}"
        self.store, self._second = (dist.PrefixStore(prefix, store) for store in stores)
        if self._rank != 0:
            threading.Thread(target=self._listen, daemon=True).start()

    def phase(self, name: str, groups: Sequence[Group], work: Callable[[], Any]) -> list[Any]:
        """Do `work` on all ranks at once; on rank 0 returns what it returned on each of them, by rank, elsewhere [].

        `groups` are those that come together for it, and are named if they do not. Where `work` raises on any rank or
        is not done in time, all processes end: with CONFIGURATION for a user's error, else with STALLED.
        """
        number, self._name = self._phase, name
        # The last resort, until the next phase begins: needs no Python, should a library hold the interpreter's lock.
        faulthandler.dump_traceback_later(self.timeout + 3 * MARGIN_SECONDS, exit=True)
        if self._rank == 0:
            threading.Thread(target=self._watch, args=(number, name, groups), daemon=True).start()
        try:
            self.store.set(f"{number}/at/{self._rank}", "")
            said = {"result": work()}
        except UserError as error:
            said = {"error": str(error), "code": CONFIGURATION}
        except Exception as error:
            said = {"error": f"{type(error).__name__}: {_first_line(error)}", "code": STALLED}
        self._say(number, said)
        self._passed.get()
        self._phase += 1
        return self._results if self._rank == 0 else []

    def _say(self, number: int, said: dict[str, Any]) -> None:
        try:
            self.store.set(f"{number}/done/{self._rank}", json.dumps(said))
            if "error" in said:
                self.store.set(f"{number}/error", "")
        except RuntimeError:  # rank 0 has gone: the other thread says so
            return

    def tell(self, name: str, value: Any) -> None:
        """On rank 0: write something for all others."""
        self.store.set(name, json.dumps(value))

    def ask(self, name: str) -> Any:
        """What rank 0 has told in an earlier phase."""
        return json.loads(self.store.get(name))

    def fail(self, code: int, text: str) -> NoReturn:
        """On rank 0, between two phases: say `text` and end all processes with `code`."""
        self._end(self._phase, Failure(code, text))

    def finish(self) -> None:
        """Leave the board together. Collective."""
        self.phase("the end", (), lambda: None)
        faulthandler.cancel_dump_traceback_later()
        self._finished = True
        self.store.set(f"gone/{self._rank}", "")
        if self._rank == 0:
            self._await_the_others()

    def _listen(self) -> None:
        """Other ranks' thread: wait for rank 0's word on one phase after the other; a bad one ends the process."""
        number = 0
        while True:
            try:
                self._second.wait([f"{number}/word"], timedelta(seconds=self.timeout + MARGIN_SECONDS))
                code = int(self._second.get(f"{number}/word"))
            except RuntimeError as error:
                if self._finished:
                    return
                self._leave(
                    STALLED,
                    f"preflight: FAILED: {self.roster.named(0)} did not arrive at {self._name}, or has gone: it has "
                    f"given no word; says rank {self._rank} on {self.roster.node(self._rank)} ({_first_line(error)})",
                )
            if code:
                self._second.set(f"gone/{self._rank}", "")
                self._leave(code, "")
            self._passed.put(None)
            number += 1

    def _watch(self, number: int, name: str, groups: Sequence[Group]) -> None:
        """Rank 0's thread of one phase: wait for all ranks, and give the word."""
        world = range(self._world)
        done = [f"{number}/done/{rank}" for rank in world]
        started = time.monotonic()
        deadline = started + self.timeout
        error = [f"{number}/error"]
        while not self._second.check(done) and not self._second.check(error) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        self._wait(done, min(deadline, time.monotonic() + AFTER_AN_ERROR_SECONDS))
        finished = self._there(done)
        values = self._second.multi_get([done[rank] for rank in finished]) if finished else []
        told = {rank: json.loads(value) for rank, value in zip(finished, values, strict=True)}
        arrived = self._there([f"{number}/at/{rank}" for rank in world])
        failed = failure(name, groups, self.roster, arrived, told, time.monotonic() - started)
        if failed is not None:
            self._end(number, failed)
        self._results = [told[rank]["result"] for rank in world]
        self._second.set(f"{number}/word", "0")
        self._passed.put(None)

    def _there(self, keys: list[str]) -> list[int]:
        """The ranks whose keys are on the board; `keys` is by rank."""
        if self._second.check(keys):
            return list(range(len(keys)))
        return [rank for rank, key in enumerate(keys) if self._second.check([key])]

    def _wait(self, keys: list[str], deadline: float) -> bool:
        """Whether all keys are on the board. Looks instead of calling `wait`, which prints a page when it is over."""
        while not self._second.check(keys):
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def _end(self, number: int, failed: Failure) -> NoReturn:
        """Rank 0: the last word, heard by all ranks that ever came."""
        print(failed.text, file=sys.stderr, flush=True)
        self._second.set(f"{number}/word", str(failed.code))
        self._await_the_others()
        self._leave(failed.code, "")

    def _await_the_others(self) -> None:
        came = self._there([f"0/at/{rank}" for rank in range(self._world)])
        self._wait([f"gone/{rank}" for rank in came if rank != 0], time.monotonic() + GOODBYE_SECONDS)

    def _leave(self, code: int, text: str) -> NoReturn:
        """End the process; `text` is said by one rank of each node."""
        if text and self._speaks:
            print(text, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the main thread may be inside of a collective for ever


def _connect(host: str, port: int, world_size: int, serve: bool, timeout: float) -> dist.TCPStore:
    """Raises OSError or RuntimeError if nobody listens there in time."""
    deadline = time.monotonic() + timeout
    while not serve:  # a store that cannot connect prints a page
        try:
            socket.create_connection((host, port), _CONNECT_SECONDS).close()
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_SECONDS)
    return dist.TCPStore(host, port, world_size, serve, timedelta(seconds=timeout), wait_for_workers=False)


def _allow_open_files() -> None:
    """Rank 0 holds two connections of every rank; the soft limit is often 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:_LONGEST]
