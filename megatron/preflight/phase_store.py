"""The phases of the preflight in rank 0's store: every rank writes that it arrived at a phase, and its outcome.

A collective that hangs cannot report itself. Instead a thread of rank 0 reads the store and knows, when a phase times
out, which ranks have not arrived and which have not finished. A thread of every other rank waits for rank 0's verdict
and ends the process, even if its main thread is stuck.

If the launcher gives all ranks a secret in the environment (SECRET; job.sh does), every message is sealed with it, and
messages without the seal are ignored and counted. No process group exists yet that could distribute a secret.
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
from megatron.common.sealing import Seal
from megatron.parallel.loopback import LOOPBACK, on_one_node, serve_on_loopback, talk_over_loopback
from megatron.parallel.rank_env import StartedRank
from megatron.preflight.diagnosis import CONFIGURATION, STALLED, Group, PhaseFailure, Roster, phase_failure

MARGIN_SECONDS = 10.0  # how much longer than the phase's timeout the other ranks wait for rank 0's verdict
GOODBYE_SECONDS = 3.0  # how long rank 0 waits before it ends, so that the others can read its last verdict
AFTER_AN_ERROR_SECONDS = 3.0  # how long the others have to finish after the first failure
_POLL_SECONDS = 0.05  # between two reads by rank 0 of its own store
_RETRY_SECONDS, _CONNECT_SECONDS = 0.2, 5.0  # timeout of a rank that connects to rank 0
_LONGEST = 200  # maximum length of an error message in characters
SECRET = "NEOX_SECRET"  # the variable


class PhaseStore:
    """One rank's access to the store. `timeout`, in seconds, applies to each phase.

    `open_to_others` says that messages between nodes are not sealed.
    """

    def __init__(self, started: StartedRank, env: Mapping[str, str], roster: Roster, timeout: float) -> None:
        """Connect. If rank 0 does not arrive within the timeout, the process ends with STALLED."""
        self.roster, self.timeout = roster, timeout
        self._rank, self._world, self._prints = started.rank, started.world_size, started.local_rank == 0
        self._phase, self._name, self._finished = 0, "the start", False
        self._passed: queue.Queue[None] = queue.Queue()
        self._results: list[Any] = []
        self._seal = Seal(env[SECRET].encode(), _report_foreign) if env.get(SECRET) else None
        _allow_open_files()
        host, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
        local = on_one_node(started, env)
        if local:
            talk_over_loopback()
            host = LOOPBACK
        serves = self._rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            # A connection serves one call at a time, and the second thread's calls block.
            served = [serve_on_loopback(port, timedelta(seconds=timeout))] if serves and local else []
            roles = (False,) if served else (serves, False)
            stores = served + [_connect(host, port, self._world, serve, timeout) for serve in roles]
        except (RuntimeError, OSError) as error:
            self._leave(
                STALLED,
                f"preflight: FAILED at the start: rank 0 on {roster.node(0)} did not arrive within {timeout:.0f} s, it "
                f"should listen at {host}:{port}; reported by rank {self._rank} on {roster.node(self._rank)} "
                f"({_first_line(error)})",
            )
        self.open_to_others = self._seal is None and not local and started.local_world_size != started.world_size
        prefix = f"preflight{env.get('TORCHELASTIC_RESTART_COUNT', '')}" + (self._seal.name if self._seal else "")
        self.torch_store, self._second_store = (dist.PrefixStore(prefix, store) for store in stores)
        if self._rank != 0:
            threading.Thread(target=self._follow_verdicts, daemon=True).start()

    @property
    def ignored(self) -> int:
        """Messages read that were not this preflight's."""
        return 0 if self._seal is None else self._seal.ignored

    def phase(self, name: str, groups: Sequence[Group], work: Callable[[], Any]) -> list[Any]:
        """Run `work` on all ranks at once; returns its results by rank on rank 0, [] on the others. Collective.

        `groups` are the groups that communicate in `work`; they are named if they fail. If `work` raises on any rank or
        does not finish in time, all processes end: with CONFIGURATION after a UserError, else with STALLED.
        """
        number, self._name = self._phase, name
        # Last resort, reset by the next phase: it ends the process even if a library holds the interpreter's lock.
        faulthandler.dump_traceback_later(self.timeout + 3 * MARGIN_SECONDS, exit=True)
        if self._rank == 0:
            threading.Thread(target=self._watch, args=(number, name, groups), daemon=True).start()
        try:
            self._send(self.torch_store, f"{number}/at/{self._rank}", "")
            outcome = {"result": work()}
        except UserError as error:
            outcome = {"error": str(error), "code": CONFIGURATION}
        except Exception as error:
            outcome = {"error": f"{type(error).__name__}: {_first_line(error)}", "code": STALLED}
        self._write(number, outcome)
        self._passed.get()
        self._phase += 1
        return self._results if self._rank == 0 else []

    def _write(self, number: int, outcome: dict[str, Any]) -> None:
        try:
            self._send(self.torch_store, f"{number}/done/{self._rank}", json.dumps(outcome))
            if "error" in outcome:
                self._send(self.torch_store, f"{number}/error", "")
        except RuntimeError:  # rank 0 is gone: the other thread reports it
            return

    def publish(self, name: str, value: Any) -> None:
        """On rank 0: write a value for all other ranks."""
        self._send(self.torch_store, name, json.dumps(value))

    def read(self, name: str) -> Any:
        """A value that rank 0 has published in an earlier phase."""
        text = self._opened(name, self.torch_store.get(name))
        if text is None:
            raise UserError(f"{name} in rank 0's store is not what rank 0 wrote; somebody else writes to its store")
        return json.loads(text)

    def fail(self, code: int, text: str) -> NoReturn:
        """On rank 0, between two phases: print `text` and end all processes with `code`."""
        self._end(self._phase, PhaseFailure(code, text))

    def finish(self) -> None:
        """End the last phase together. Collective."""
        self.phase("the end", (), lambda: None)
        faulthandler.cancel_dump_traceback_later()
        self._finished = True
        self._send(self.torch_store, f"gone/{self._rank}", "")
        if self._rank == 0:
            self._await_the_others()

    def _follow_verdicts(self) -> None:
        """Thread of the other ranks: wait for rank 0's verdict on each phase; a failure ends the process."""
        number = 0
        while True:
            try:
                code = int(self._verdict(f"{number}/verdict"))
            except ValueError:
                zero = self.roster.named(0)
                text = f"preflight: FAILED: {zero} did not write this verdict; somebody else writes to its store"
                self._leave(STALLED, f"{text} (reported by rank {self._rank})")
            except RuntimeError as error:
                if self._finished:
                    return
                self._leave(
                    STALLED,
                    f"preflight: FAILED: {self.roster.named(0)} did not arrive at {self._name}, or is gone: it did "
                    f"not respond; reported by rank {self._rank} on {self.roster.node(self._rank)} "
                    f"({_first_line(error)})",
                )
            if code:
                self._send(self._second_store, f"gone/{self._rank}", "")
                self._leave(code, "")
            self._passed.put(None)
            number += 1

    def _verdict(self, key: str) -> str:
        """Wait for rank 0's verdict on a phase. Raises ValueError if something else was written in its place."""
        deadline = time.monotonic() + self.timeout + MARGIN_SECONDS
        self._second_store.wait([key], timedelta(seconds=self.timeout + MARGIN_SECONDS))
        while (text := self._opened(key, self._second_store.get(key))) is None:
            if time.monotonic() > deadline:
                raise ValueError(key)
            time.sleep(_RETRY_SECONDS)
        return text

    def _watch(self, number: int, name: str, groups: Sequence[Group]) -> None:
        """Rank 0's thread of one phase. If it fails, a hang would go unnoticed, so the preflight ends with the
        reason."""
        try:
            self._judge(number, name, groups)
        except Exception as error:
            text = f"preflight: FAILED at {name}: its watchdog failed ({type(error).__name__}: {_first_line(error)})"
            self._end(number, PhaseFailure(STALLED, text))

    def _judge(self, number: int, name: str, groups: Sequence[Group]) -> None:
        """Wait for all ranks, then publish the verdict."""
        world = range(self._world)
        done = [f"{number}/done/{rank}" for rank in world]
        started = time.monotonic()
        deadline = started + self.timeout
        error = [f"{number}/error"]
        # Until all ranks are done, one has failed, or the time is up.
        while not self._all_there(done) and not self._all_there(error):
            if time.monotonic() >= deadline:
                break
            time.sleep(_POLL_SECONDS)
        # After a failure the other ranks may still finish, and report their own errors.
        self._wait(done, min(deadline, time.monotonic() + AFTER_AN_ERROR_SECONDS))
        outcomes = {rank: json.loads(text) for rank, text in self._by_rank(done).items()}
        arrived = list(self._by_rank([f"{number}/at/{rank}" for rank in world]))
        failed = phase_failure(name, groups, self.roster, arrived, outcomes, time.monotonic() - started)
        if failed is not None:
            self._end(number, failed)
        self._results = [outcomes[rank]["result"] for rank in world]
        self._send(self._second_store, f"{number}/verdict", "0")
        self._passed.put(None)

    def _by_rank(self, keys: list[str]) -> dict[int, str]:
        """What the ranks have written; `keys` is by rank."""
        everyone = self._second_store.check(keys)
        there = [rank for rank, key in enumerate(keys) if everyone or self._second_store.check([key])]
        texts = self._texts([keys[rank] for rank in there])
        return {rank: text for rank, text in zip(there, texts, strict=True) if text is not None}

    def _all_there(self, keys: list[str]) -> bool:
        return self._second_store.check(keys) and None not in self._texts(keys)

    def _texts(self, keys: list[str]) -> list[str | None]:
        """The messages under keys that exist; None for those that are not this preflight's."""
        values = self._second_store.multi_get(keys) if keys else []
        return [self._opened(key, value) for key, value in zip(keys, values, strict=True)]

    def _send(self, store: dist.Store, key: str, text: str) -> None:
        store.set(key, text if self._seal is None else self._seal.sealed(key, text))

    def _opened(self, key: str, message: bytes) -> str | None:
        return message.decode() if self._seal is None else self._seal.opened(key, message)

    def _wait(self, keys: list[str], deadline: float) -> bool:
        """Whether all keys are in the store by the deadline. Polls, because the store's `wait` prints a long message if
        it fails."""
        while not self._all_there(keys):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def _end(self, number: int, failed: PhaseFailure) -> NoReturn:
        """On rank 0: publish a failure to all ranks that ever arrived, and end."""
        print(failed.text, file=sys.stderr, flush=True)
        self._send(self._second_store, f"{number}/verdict", str(failed.code))
        self._await_the_others()
        self._leave(failed.code, "")

    def _await_the_others(self) -> None:
        arrived = self._by_rank([f"0/at/{rank}" for rank in range(self._world)])
        self._wait([f"gone/{rank}" for rank in arrived if rank != 0], time.monotonic() + GOODBYE_SECONDS)

    def _leave(self, code: int, text: str) -> NoReturn:
        """End the process; one rank of each node prints `text`."""
        if text and self._prints:
            print(text, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the main thread may never return from a collective


def _report_foreign() -> None:
    print("preflight: a message from outside this preflight was ignored", file=sys.stderr, flush=True)


def _connect(host: str, port: int, world_size: int, serve: bool, timeout: float) -> dist.TCPStore:
    """Raises OSError or RuntimeError if nothing listens there within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not serve:  # a store that cannot connect prints pages of errors
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
