"""The watchdog's judgement, without processes: limits, who is named, what counts as waiting."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.parallel.process_groups import Place
from megatron.supervision.failures import (
    LOST,
    LOST_NODES,
    WHY,
    LostRanks,
    claim_failure,
    claim_loss,
    clear,
    recorded_code,
)
from megatron.supervision.status_store import Beat, Board, Whereabouts, beat_of
from megatron.supervision.watchdog import Verdict, Watchdog
from tests.support.models import Case

pytestmark = pytest.mark.unit

TITLES = [f"n{rank // 2} (pipe {rank // 2}, data 0, tensor {rank % 2})" for rank in range(4)]


def watchdog(**keys: Any) -> Watchdog:
    args = Case().neox(world_size=1, **keys)
    watch = Watchdog(args, Place(0, 4, 0, 0, 0, 0, torch.device("cpu")))
    watch.board = Board(None, 0, TITLES)  # type: ignore[arg-type]
    return watch


def beat(waits: bool = True, number: int = 1, seconds: float = 100.0, phase: str = "forward") -> Beat:
    return Beat(number, phase, 12, seconds, waits, "megatron/data/sampler.py:80")


def test_limits_of_phases() -> None:
    """A step has step_timeout_minutes, all else 0.9 x distributed_timeout_minutes; progress starts anew."""
    watch = watchdog(step_timeout_minutes=5.0, distributed_timeout_minutes=20)
    where = watch.whereabouts
    for hurried, minutes in ((True, 5), (False, 18)):
        where.hurried = hurried
        where.at("forward")
        where.since -= 60 * minutes - 1
        assert not watch._stuck()
        where.since -= 2
        assert watch._stuck()
        where.at("backward")
        assert not watch._stuck()


def test_the_default_limit_leaves_the_collectives_time() -> None:
    assert Case().neox(world_size=1).step_timeout_minutes == 10
    assert Case().neox(world_size=1, distributed_timeout_minutes=4).step_timeout_minutes == pytest.approx(3.6)


def test_those_who_did_not_arrive_are_named() -> None:
    verdict = watchdog()._hang([beat(), beat(), beat(waits=False, phase="data"), beat()])
    assert verdict.lost == [2]
    assert "1 rank did not arrive: rank 2 on n1 (pipe 1, data 0, tensor 0), in data of iteration 12" in verdict.why
    assert "at megatron/data/sampler.py:80 for 100 s" in verdict.why


def test_where_all_wait_the_first_is_named_with_a_warning() -> None:
    verdict = watchdog()._hang([beat(), beat(seconds=140.0), beat(), beat()])
    assert verdict.lost == [], "no node to exclude"
    assert "all ranks wait, none stands out; longest of all rank 1 on n0" in verdict.why


def test_silence_is_counted_from_the_last_new_beat() -> None:
    watch, seen = watchdog(heartbeat_timeout_seconds=30.0), {}
    for number in range(40):  # rank 3 stops at beat 5, which is seen at 1010
        watch._awake_seconds = 1000.0 + 2 * number
        beats = [beat(number=number)] * 3 + [beat(number=min(number, 5))]
        verdict = watch._silent(beats, seen)
        assert (verdict is not None) == (watch._awake_seconds > 1040.0), watch._awake_seconds
        if verdict is not None:
            break
    assert verdict is not None
    assert verdict.lost == [3]
    assert "1 rank lost: rank 3 on n1 (pipe 1, data 0, tensor 1): no sign of life for 30 s" in verdict.why


def test_many_lost_ranks_are_not_all_listed() -> None:
    watch = watchdog()
    watch.board = Board(None, 0, TITLES * 8)  # type: ignore[arg-type]
    verdict = watch._gone(list(range(20)), [beat()] * 32, "gone")
    assert verdict.why.startswith("20 ranks lost: ")
    assert verdict.why.endswith(" and 12 more")
    assert watch._error(verdict).nodes == ["n0", "n1"]


def test_a_rank_inside_a_collective_waits() -> None:
    """A thread in torch.distributed has arrived; one in this project's code, or anywhere else, has not."""
    import torch.distributed as dist

    release = threading.Event()
    inside = compile("def inside(event):\n    event.wait()\n", dist.__file__.replace("__init__", "collective"), "exec")
    code: dict[str, Any] = {}
    exec(inside, code)
    for function, waits in ((code["inside"], True), (lambda event: event.wait(), False)):
        release.clear()
        thread = threading.Thread(target=function, args=(release,))
        thread.start()
        while not thread.is_alive():
            time.sleep(0.001)
        told = beat_of(3, Whereabouts(phase="backward", iteration=7), threading.main_thread().ident or 0)
        assert told.waits is waits
        assert (told.number, told.phase, told.iteration) == (3, "backward", 7)
        release.set()
        thread.join()


def test_verdicts_travel_as_text() -> None:
    verdict = Verdict("1 rank lost: …", [3], 0)
    assert Verdict(**json.loads(verdict.to_json())) == verdict
    own = Verdict("KeyError", [], 2, own_error=True)
    assert Verdict(**json.loads(own.to_json())) == own


def test_the_first_of_the_losses_is_written_for_the_batch_script(tmp_path: Path) -> None:
    assert claim_loss(tmp_path, LostRanks("rank 3 on n7 is gone", ["n7"]))
    assert not claim_loss(tmp_path, LostRanks("rank 4 on n8 is gone", ["n8"]))
    assert not claim_failure(tmp_path, 1, "something in its wake")
    assert recorded_code(tmp_path) == LOST
    assert (tmp_path / WHY).read_text() == "rank 3 on n7 is gone\n"
    assert (tmp_path / LOST_NODES).read_text() == "n7\n"
    clear(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert claim_loss(None, LostRanks("rank 3 is gone", [], first=True))
    assert not claim_loss(None, LostRanks("rank 3 is gone", [], first=False)), "another rank says it"
