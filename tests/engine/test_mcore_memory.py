"""Activation memory of engine: megatron in live bytes does not grow with the number of micro-batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.support.ranks import run_ranks
from tests.support.variant_runs import UNTIED, Variant

pytestmark = pytest.mark.distributed

VARIANT = Variant(replace(UNTIED, layers=4))
STEPS = 2


def _peaks(rank: int, world_size: int, virtual: int, counts: tuple[int, ...], keys: dict[str, Any]) -> list[int]:
    """Peak bytes of the last of several steps above the level between steps, by number of micro-batches."""
    from benchmarks.live_bytes import LiveBytes
    from megatron.engine.mcore import MegatronEngine
    from tests.support.engine_runs import build, make_samples, step

    run, held = MegatronEngine._run, 0

    def counted(*arguments: Any, **options: Any) -> Any:
        """Measure what the schedule holds; the micro-batches themselves were created before."""
        nonlocal held
        before = live.now
        live.reset_peak()
        result = run(*arguments, **options)
        held = live.peak - before
        return result

    MegatronEngine._run = counted  # type: ignore[method-assign]
    found = []
    for count in counts:
        more = {"virtual_pipe_parallel_size": virtual, "gradient_accumulation_steps": count, **keys}
        args = VARIANT.arguments((1, 2, 1), False, engine="megatron", **more)
        samples = make_samples(VARIANT.case, 2 * count)
        with LiveBytes() as live:
            engine = build(args, VARIANT.case)
            for iteration in range(STEPS):
                step(engine, args, samples, iteration)
        found.append(held)
    return found


@pytest.mark.parametrize("virtual", [1, 2])
def test_memory_does_not_grow_with_the_micro_batches(virtual: int) -> None:
    for rank in run_ranks(_peaks, 2, virtual, (4, 8), {}):
        few, more = rank
        assert few == pytest.approx(more, rel=0.01)


def test_recomputed_activations_are_not_stored() -> None:
    """Recomputing whole layers stores least; then everything but matrix products; recomputing nothing stores most."""
    kinds: list[dict[str, Any]] = [{"recompute": "full"}, {"recompute": "selective"}, {"recompute": "none"}]
    full, selective, none = ([peak for (peak,) in run_ranks(_peaks, 2, 2, (4,), kind)] for kind in kinds)
    for rank in range(2):
        print(rank, full[rank] / none[rank], selective[rank] / none[rank])
        assert full[rank] < 0.6 * none[rank]
        assert full[rank] < selective[rank] < 0.8 * none[rank]
