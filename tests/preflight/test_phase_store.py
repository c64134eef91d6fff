"""The preflight's messages are authenticated with the job's secret, and forged ones are ignored."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import TCPStore

from megatron.common.sealing import Seal
from megatron.parallel.rank_env import StartedRank
from megatron.preflight import phase_store
from megatron.preflight.diagnosis import Roster
from megatron.preflight.phase_store import SECRET, PhaseStore

pytestmark = pytest.mark.unit

WORLD = 2


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[PhaseStore], list[tuple[int, str]], TCPStore]]:
    """Both ranks' access to one store, exit codes with which processes would have ended, and a foreign connection."""
    ended: list[tuple[int, str]] = []

    def leave(store: PhaseStore, code: int, text: str) -> None:
        ended.append((code, text))
        raise SystemExit

    monkeypatch.setattr(PhaseStore, "_leave", leave)
    monkeypatch.setattr(phase_store.faulthandler, "dump_traceback_later", lambda *args, **options: None)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), SECRET: "known to the ranks"}
    ranks = [StartedRank(rank, WORLD, rank, WORLD, "RANK") for rank in range(WORLD)]
    stores = [PhaseStore(rank, env, Roster(WORLD), 30.0) for rank in ranks]
    yield stores, ended, TCPStore("127.0.0.1", port, wait_for_workers=False, timeout=timedelta(seconds=10))
    for store in stores:
        store._finished = True  # the thread that follows rank 0 ends with the store, without ending the process


def test_forged_outcomes_and_verdicts_are_ignored(pair: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A foreign client that lists the keys writes outcome and verdict, without the secret and with another secret."""
    (zero, one), ended, foreign = pair
    forged = threading.Event()
    results: list[Any] = []

    def second() -> None:
        one.phase("the phase", (), lambda: forged.wait(20) and "one")
        results.append("went on")

    def first() -> None:
        results.append(zero.phase("the phase", (), lambda: "zero"))

    threads = [threading.Thread(target=run, daemon=True) for run in (second, first)]
    for thread in threads:
        thread.start()
    while not any("0/done/0" in key for key in foreign.list_keys()):
        pass
    prefix = next(key for key in foreign.list_keys() if "0/done/0" in key).removesuffix("0/done/0")
    outcome = json.dumps({"result": "forged"})
    before = zero.ignored
    for message in (outcome, Seal(b"another").sealed("0/done/1", outcome), foreign.get(f"{prefix}0/done/0").decode()):
        foreign.set(f"{prefix}0/done/1", message)
        foreign.set(f"{prefix}0/error", "")
        foreign.set(f"{prefix}0/verdict", "2")
        while zero.ignored < before + 3 or not one.ignored:
            assert not ended, ended
        before = zero.ignored
    forged.set()
    for thread in threads:
        thread.join(20)
    assert sorted(map(str, results)) == ["['zero', 'one']", "went on"]
    assert not ended
    assert capsys.readouterr().err.count("a message from outside this preflight was ignored") == WORLD
    assert zero.ignored > 8


def test_what_rank_0_publishes_is_its_own(pair: Any) -> None:
    (zero, one), _, foreign = pair
    zero.publish("sizes", [1, 2])
    assert one.read("sizes") == [1, 2]
    foreign.set(next(key for key in foreign.list_keys() if key.endswith("sizes")), "[3]")
    with pytest.raises(phase_store.UserError, match="is not what rank 0 wrote"):
        one.read("sizes")
