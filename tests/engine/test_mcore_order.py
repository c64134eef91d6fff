"""The schedule of engine: megatron: no order of messages deadlocks, and idle time agrees with theory."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest

from benchmarks.engine_order import DeadlockError, Event, play, record
from megatron.planner.cost.interleaved import ChunkPass, pass_order, simulate

pytestmark = pytest.mark.unit

GRID = list(product((4, 8), (1, 2, 5, 10), (16, 32)))


FAST = [(4, 1, 16), (4, 2, 16), (8, 5, 16), (2, 1, 4), (2, 2, 4), (3, 2, 6)]
SLOW = [pytest.param(*sizes, marks=pytest.mark.slow) for sizes in GRID if sizes not in FAST]


@pytest.mark.parametrize(("p", "v", "m"), [*FAST, *SLOW])
def test_every_schedule_finishes(p: int, v: int, m: int) -> None:
    """Each rank runs each of its passes once, with messages of any duration; idle time is that of 1F1B over v p stages.

    With instantaneous messages, a step takes the v m passes of a rank and p - 1 of each kind to fill and drain the
    pipeline (Narayanan et al. 2021, section 2.2).
    """
    orders = record(p, v, m)
    for order in orders:
        done = Counter(event[:3] for event in order if event.what in ("forward", "backward"))
        assert done == Counter(
            (kind, chunk, number) for kind in ("forward", "backward") for chunk in range(v) for number in range(m)
        )
    executed = [[ChunkPass(*event[:3]) for event in order if event.what in ("forward", "backward")] for order in orders]
    assert executed == [pass_order(p, v, m, rank) for rank in range(p)], "what the planner knows of it"
    for message in (0.0, 0.01, 1.0):
        play(orders, 1.0, 2.0, message)
    found = play(orders, 1.0, 2.0)
    assert found.busy == (3.0 * v * m,) * p
    assert found.seconds == pytest.approx(3.0 * (v * m + p - 1))
    assert found.idle == pytest.approx(simulate(p, v, m, [1.0] * p * v, [2.0] * p * v).idle)


def test_mutual_waiting_is_detected() -> None:
    """Two ranks, each of which sends only after its own receive has completed."""
    there, back = ("hidden", 0), ("hidden", 1)
    one = [
        Event("receive", link=back, number=0),
        Event("wait", link=back, number=0),
        Event("send", link=there, number=0),
    ]
    other = [
        Event("receive", link=there, number=0),
        Event("wait", link=there, number=0),
        Event("send", link=back, number=0),
    ]
    with pytest.raises(DeadlockError, match=r"rank 0 at Event\(what='wait'"):
        play([one, other], 1.0, 2.0)
    other.insert(0, other.pop())
    play([one, other], 1.0, 2.0)


def test_an_unreceived_message_is_detected() -> None:
    with pytest.raises(DeadlockError, match="messages with one end"):
        play([[Event("send", link=("hidden", 0), number=0)], []], 1.0, 2.0)
