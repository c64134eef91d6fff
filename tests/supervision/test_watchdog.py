"""Hang diagnosis without processes: limits, which ranks are named, what is considered waiting; the files of a loss."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

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
from megatron.supervision.hang_diagnosis import (
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
from megatron.supervision.status_store import Beat, Whereabouts, current_beat
from tests.support.models import Case

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
TITLES = [f"n{rank // 2} (pipe {rank // 2}, data 0, tensor {rank % 2})" for rank in range(4)]


def beat(waits: bool = True, number: int = 1, seconds: float = 100.0, phase: str = "forward") -> Beat:
    return Beat(number, phase, 12, seconds, waits, "megatron/data/sampler.py:80")


def limits(world_size: int = 4, **keys: Any) -> Limits:
    return Limits.of_run(Case().neox(world_size=1, **keys), world_size)


@pytest.mark.parametrize(("rank", "head_start"), [(0, 0.0), (1, 5.0)])
@pytest.mark.parametrize(("under_step_timeout", "minutes"), [(True, 5), (False, 18)])
def test_limits_of_phases(rank: int, head_start: float, under_step_timeout: bool, minutes: int) -> None:
    """A step has step_timeout_minutes, all else 0.9 x distributed_timeout_minutes; progress starts anew."""
    of_run = limits(step_timeout_minutes=5.0, distributed_timeout_minutes=20)
    assert of_run.interval == pytest.approx(1.008), "heartbeats are seconds apart"
    now = 1000.0
    where = Whereabouts(lambda: now, under_step_timeout=under_step_timeout)
    where.at("forward")
    allowed = 60 * minutes + head_start * of_run.interval
    now += allowed - 0.1
    assert not is_stuck(where, of_run, rank)
    now += 0.2
    assert is_stuck(where, of_run, rank)
    where.at("backward")
    assert not is_stuck(where, of_run, rank)


def test_the_default_limit_leaves_the_collectives_time() -> None:
    assert Case().neox(world_size=1).step_timeout_minutes == 10
    assert Case().neox(world_size=1, distributed_timeout_minutes=4).step_timeout_minutes == pytest.approx(3.6)


def hang(beats: list[Beat]) -> RunVerdict:
    return hang_verdict(beats, Whereabouts(lambda: 0.0, "forward", 12), TITLES, by=0)


def test_ranks_that_did_not_arrive_are_reported() -> None:
    verdict = hang([beat(), beat(), beat(waits=False, phase="data"), beat()])
    assert verdict.lost == [2]
    assert "1 rank did not arrive: rank 2 on n1 (pipe 1, data 0, tensor 0), in data of iteration 12" in verdict.why
    assert "at megatron/data/sampler.py:80 for 100 s" in verdict.why


def test_where_all_wait_the_first_is_named_with_a_warning() -> None:
    verdict = hang([beat(), beat(seconds=140.0), beat(), beat()])
    assert verdict.lost == [], "no node to exclude"
    assert "all ranks wait, none stands out; longest of all rank 1 on n0" in verdict.why


def test_silence_is_counted_from_the_last_new_beat() -> None:
    of_run, arrivals = limits(heartbeat_timeout_seconds=30.0), {}
    for number in range(40):  # rank 3 stops at beat 5, which arrives at 1010
        now = 1000.0 + 2 * number
        beats = [beat(number=number)] * 3 + [beat(number=min(number, 5))]
        arrivals = with_arrivals(arrivals, beats, now)
        silent = silent_ranks(arrivals, now, of_run)
        assert silent == ([3] if now > 1040.0 else []), now
    verdict = lost_verdict(silent, "no sign of life for 30 s", beats, TITLES, by=0)
    assert verdict.lost == [3]
    assert "1 rank lost: rank 3 on n1 (pipe 1, data 0, tensor 1): no sign of life for 30 s" in verdict.why


def test_a_rank_without_a_new_beat_is_gone() -> None:
    before, after = [beat(number=number) for number in (5, 5, 7, 9)], [beat(number=number) for number in (5, 5, 8, 9)]
    assert no_heartbeat(after, before, rank=0) == [1, 3], "rank 0 itself only looks"


def test_many_lost_ranks_are_not_all_listed() -> None:
    titles = TITLES * 8
    verdict = lost_verdict(list(range(20)), "gone", [beat()] * 32, titles, by=0)
    assert verdict.why.startswith("20 ranks lost: ")
    assert verdict.why.count(": gone, last seen in forward of iteration 12") == 8
    assert verdict.why.endswith(" and 12 more")
    assert verdict.as_error(titles, rank=0, stacks=None).nodes == ["n0", "n1"]


def test_the_error_says_where_the_stacks_are() -> None:
    verdict = rank_0_verdict("it has ended", TITLES, by=2)
    error = verdict.as_error(TITLES, rank=1, stacks=Path("log/stacks"))
    assert str(error) == "1 rank lost: rank 0 on n0 (pipe 0, data 0, tensor 0): it has ended; stacks in log/stacks"
    assert error.nodes == ["n0"]
    assert not error.first, "rank 2 reports it"


def test_a_rank_inside_a_collective_waits() -> None:
    """A thread in torch.distributed has arrived; one in this project's code, or anywhere else, has not."""
    import torch.distributed as dist

    source = "def wait(entered, release):\n    entered.set()\n    release.wait()\n"
    for file, waits in ((dist.__file__.replace("__init__", "collective"), True), (__file__, False)):
        code: dict[str, Any] = {}
        exec(compile(source, file, "exec"), code)
        entered, release = threading.Event(), threading.Event()
        thread = threading.Thread(target=code["wait"], args=(entered, release))
        thread.start()
        assert entered.wait(60)
        sent = current_beat(3, Whereabouts(phase="backward", iteration=7), threading.main_thread().ident or 0)
        assert sent.waits is waits
        assert (sent.number, sent.phase, sent.iteration) == (3, "backward", 7)
        release.set()
        thread.join()


def test_a_beat_names_the_innermost_line_of_the_project() -> None:
    main, sent = threading.main_thread().ident or 0, []
    thread = threading.Thread(target=lambda: sent.extend(current_beat(1, Whereabouts(), one) for one in (main, 0)))
    line = sys._getframe().f_lineno + 1
    thread.start()
    thread.join()
    assert sent[0].line in [f"tests/supervision/test_watchdog.py:{line + after}" for after in (0, 1)]
    assert sent[1].line == "", "no such thread"


BUSY = """
import sys, threading, torch
from megatron.supervision.status_store import Whereabouts, current_beat

sys.setswitchinterval(1e-6)
done = threading.Event()

def beats():
    while not done.wait(3e-4):
        current_beat(1, Whereabouts(), threading.main_thread().ident)

def deep(x, depth):
    return deep(x, depth - 1) if depth else x * 1.0

class Op(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return deep(gradient, 6)

class Layer(torch.nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            deep(x, 4)
        return Op.apply(super().forward(x))

beating = threading.Thread(target=beats)
beating.start()
model = torch.nn.Sequential(*[Layer(16, 16) for _ in range(4)])
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(int(sys.argv[1])):
    model(torch.randn(4, 16)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
done.set()
beating.join()
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_heartbeats_do_not_crash_a_busy_rank() -> None:
    """With frame objects of a running thread, as from `sys._current_frames`, this crashed within a minute."""
    for _ in range(3):
        result = subprocess.run(
            [sys.executable, "-c", BUSY, "6000"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr


def test_verdicts_travel_as_text() -> None:
    verdict = RunVerdict("1 rank lost: …", [3], 0)
    assert RunVerdict.from_json(verdict.to_json()) == verdict
    own = RunVerdict("KeyError", [], 2, own_error=True)
    assert RunVerdict.from_json(own.to_json()) == own


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
