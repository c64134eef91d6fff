"""The store used by the watchdogs: loopback only on a single machine, and only messages of the run are accepted."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import TCPStore

from benchmarks.foreign_messages import HASH, forged
from megatron.parallel.loopback import on_one_node, serve_on_loopback
from megatron.parallel.rank_env import StartedRank
from megatron.supervision import watchdog as watchdog_module
from megatron.supervision.authenticated_store import AuthenticatedStore, StoreAddress
from megatron.supervision.hang_diagnosis import Limits
from megatron.supervision.status_store import Beat, StatusStore
from megatron.supervision.watchdog import Watchdog
from tests.support.models import Case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.unit

SECRET = b"s" * 32
GARBAGE = [b"\x00" * 64, b'{"why": "x", "lost": [0], "by": 1}', b"not JSON", b"\xff\xfe\xfd" * 40, b""]


def listens_on(port: int) -> set[str]:
    """Addresses, as the kernel writes them, on which something listens at a port."""
    lines = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    return {f[1].partition(":")[0] for f in lines if f[1].endswith(f":{port:04X}") and f[3] == "0A"}


@pytest.fixture
def server() -> Any:
    return serve_on_loopback()


def connected(server: Any) -> TCPStore:
    return TCPStore("127.0.0.1", server.port, wait_for_workers=False, timeout=timedelta(seconds=10))


def test_only_this_machine_reaches_it(server: Any) -> None:
    assert listens_on(server.port) == {"0100007F"}
    everywhere = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    assert listens_on(everywhere.port) != {"0100007F"}, "torch's own listens everywhere, and this test would see it"


def test_foreign_messages_are_ignored_and_counted(server: Any) -> None:
    said: list[str] = []
    ours = AuthenticatedStore(connected(server), SECRET, said.append)
    foreign = AuthenticatedStore(connected(server), b"x" * 32)
    foreign._store = ours._store  # the worst case: it knows the names of the keys
    ours.set("a", "1")
    assert ours.get(["a"]) == ["1"]
    for number, message in enumerate(GARBAGE, 1):
        ours._store.set("a", message)  # type: ignore[arg-type]
        assert ours.get(["a"]) == [None]
        assert ours.ignored == number
    foreign.set("a", "1")
    assert ours.get(["a"]) == [None], "sealed with another secret"
    ours.set("b", "2")
    ours._store.set("a", ours._store.get("b").decode())
    assert ours.get(["a"]) == [None], "another key's message"
    assert said == ["a message from outside this run was ignored; somebody else writes to its status store"]


def test_no_forged_message_counts(server: Any) -> None:
    """Without hash, hashed with another secret, truncated, modified, of another key: all that the benchmark sends."""
    ours = AuthenticatedStore(connected(server), SECRET)
    store = StatusStore(ours, 0, 2)
    beats = [Beat(7, "step", rank, 0.0, False, "") for rank in range(2)]
    for rank, beat in enumerate(beats):
        StatusStore(ours, rank, 2).beat(beat)
    assert store.beats() == beats
    own, other = (ours._store.get(f"beat/{rank}") for rank in range(2))
    messages = list(forged("beat/0", own, [other]))
    assert len(messages) > 9
    for number, message in enumerate(messages, 1):
        ours._store.set("beat/0", message.decode())
        assert ours.get(["beat/0"]) == [None], message
        assert ours.ignored == number
        assert store._known[0] == beats[0]
    foreign = AuthenticatedStore(connected(server), b"x" * 32)
    assert foreign._seal.sealed("beat/0", "content").encode() == next(
        message for message in forged("beat/0", b"-" * HASH + b"content", []) if message[HASH:] == b"content"
    ), "the forger's format is the store's"


def test_a_foreign_verdict_neither_counts_nor_blocks_ours(server: Any) -> None:
    ours, other = (AuthenticatedStore(connected(server), SECRET) for _ in range(2))
    for message in (b'{"why": "x"}', b"\xff\x00"):
        ours._store.set("verdict", message)  # type: ignore[arg-type]
        store = StatusStore(ours, 0, 1)
        assert store.verdict() is None
        assert store.publish("first")
        assert not StatusStore(other, 1, 2).publish("second")
        assert store.verdict() == "first"


def test_replayed_and_foreign_heartbeats_are_ignored(server: Any) -> None:
    ours = AuthenticatedStore(connected(server), SECRET)
    store = StatusStore(ours, 0, 1)
    beats = [Beat(number, "step", number, 0.0, False, "") for number in range(3)]
    store.beat(beats[1])
    old = ours._store.get("beat/0")
    assert store.beats() == [beats[1]]
    ours._store.set("beat/0", b"not JSON")  # type: ignore[arg-type]
    assert store.beats() == [beats[1]]
    store.beat(beats[2])
    assert store.beats() == [beats[2]]
    ours._store.set("beat/0", old)
    assert store.beats() == [beats[2]], "replayed"


def test_the_server_lives_on_through_malformed_connections(server: Any) -> None:
    store = AuthenticatedStore(connected(server), SECRET)
    for message in [*GARBAGE, b"GET / HTTP/1.0\r\n\r\n", os.urandom(5000)]:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port), 5) as connection:
            connection.sendall(message)
    store.set("a", "1")
    assert AuthenticatedStore(connected(server), SECRET).get(["a"]) == ["1"]


def test_the_secret_is_not_printed() -> None:
    address = StoreAddress("h", 1, SECRET)
    assert SECRET.decode() not in f"{address} {address!r}"


@pytest.mark.parametrize(
    ("env", "started", "one"),
    [
        ({"SLURM_STEP_NODELIST": "n1"}, StartedRank(0, 4, 0, 4, "SLURM_PROCID"), True),
        ({"SLURM_STEP_NODELIST": "n[1-2]"}, StartedRank(0, 4, 0, 2, "SLURM_PROCID"), False),
        ({"MASTER_ADDR": "n1"}, StartedRank(0, 4, 0, 2, "RANK"), False),
        ({"MASTER_ADDR": "n1"}, StartedRank(0, 4, 0, None, "RANK"), False),
        ({"MASTER_ADDR": "n1"}, StartedRank(0, 4, 0, 4, "RANK"), True),
        ({"MASTER_ADDR": "127.0.0.1"}, StartedRank(0, 4, 0, None, "RANK"), True),
        ({"TORCHELASTIC_USE_AGENT_STORE": "True"}, StartedRank(0, 4, 0, 4, "RANK"), False),
    ],
)
def test_whether_all_ranks_are_on_one_node(env: dict[str, str], started: StartedRank, one: bool) -> None:
    assert on_one_node(started, env) is one


def _ports_of_a_run(rank: int, world_size: int) -> set[str]:
    from megatron.parallel.process_groups import form_groups

    place = form_groups(Case().neox(world_size=world_size, model_parallel_size=2))
    store = StatusStore.open(place)
    server: Any = store.store._store.underlying_store
    return listens_on(server.port) if rank == 0 else set()


@pytest.mark.distributed
def test_the_ranks_of_one_machine_meet_on_loopback() -> None:
    assert run_ranks(_ports_of_a_run, 2)[0] == {"0100007F"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("thread", ["exchange", "guard"])
def test_a_thread_of_the_watchdog_that_fails_ends_the_run_with_its_reason(
    thread: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise the run would continue unwatched, as it once did after a message that was not JSON."""
    ended = threading.Event()
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        ended.set()
        raise SystemExit

    monkeypatch.setattr(watchdog_module.os, "_exit", leave)
    place: Any = SimpleNamespace(rank=0, world_size=1)
    watch = Watchdog(Case().neox(world_size=1), place)
    watch.limits, watch.titles = Limits(100.0, 100.0, 100.0, 0.01), ["n0 (pipe 0, data 0, tensor 0)"]
    broken: Any = SimpleNamespace(beat=lambda beat: 1 / 0, verdict=lambda: None, beats=lambda: [])
    watch.store = broken
    if thread == "exchange":
        threading.Thread(target=watch._exchange, daemon=True).start()
    else:
        watch.stacks = None
        monkeypatch.setattr(watch, "_end_process", lambda verdict: 1 / 0)
        watch._verdict = object()  # type: ignore[assignment]
    threading.Thread(target=watch._guard, daemon=True).start()
    assert ended.wait(20)
    assert codes == [1]
    assert "stopped: the watchdog of rank 0 on n0" in capsys.readouterr().err
    watch._run_ended.set()
