"""Learning rate: warm-up, decay, a floor that stays, and an operator's overrides; values worked out by hand."""

import pytest

from megatron.neox_arguments import ConfigError, NeoXArgs
from megatron.trainer.schedule import Schedule, check_length
from tests.support.models import Case

pytestmark = pytest.mark.unit

PEAK, FLOOR = 1e-3, 1e-4


def learning_rate(args: NeoXArgs, iteration: int) -> float:
    return Schedule(args, 1100).learning_rate(iteration)


def args(**keys: object) -> NeoXArgs:
    defaults = {"train_iters": 1100, "warmup": 0.1, "lr_decay_iters": 1000, "min_lr": FLOOR, "world_size": 1}
    return Case().neox(**(defaults | keys))


@pytest.mark.parametrize(
    ("style", "iteration", "expected"),
    [
        ("cosine", 0, PEAK / 100),  # never zero: the first step already learns
        ("cosine", 50, PEAK / 2),
        ("cosine", 100, PEAK),
        ("cosine", 550, (PEAK + FLOOR) / 2),
        ("cosine", 1000, FLOOR),
        ("linear", 550, PEAK / 2),
        ("linear", 1000, FLOOR),
        ("exponential", 550, 0.0007071588192872713),  # GPT-NeoX's AnnealingLR gave these two
        ("exponential", 1000, 0.0005000735956957677),
        ("constant", 100, PEAK),
        ("constant", 1000, PEAK),
    ],
)
def test_values(style: str, iteration: int, expected: float) -> None:
    assert learning_rate(args(lr_decay_style=style), iteration) == pytest.approx(expected)


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
def test_flat_after_the_end(style: str) -> None:
    """GPT-NeoX's cosine is back at 56 % of the peak at one and a half times the decay."""
    run = args(lr_decay_style=style)
    end = learning_rate(run, 1000)
    assert [learning_rate(run, n) for n in (1001, 1500, 2000, 10**6)] == [end] * 4


def test_overrides_multiply_from_their_iteration_on() -> None:
    run = args(lr_decay_style="constant", lr_overrides=[{"at": 200, "scale": 0.5}, {"at": 300, "scale": 0.1}])
    assert learning_rate(run, 199) == PEAK
    assert learning_rate(run, 200) == pytest.approx(PEAK * 0.5)
    assert learning_rate(run, 300) == pytest.approx(PEAK * 0.05)


def test_no_warmup_starts_at_the_peak() -> None:
    assert learning_rate(args(lr_decay_style="cosine", warmup=0.0), 0) == PEAK


def test_the_decay_ends_with_a_run_whose_length_the_data_give() -> None:
    epochs = {"train_iters": None, "train_epochs": 2.5, "lr_decay_iters": None}
    assert Schedule(args(**epochs, lr_decay_fraction=0.8), 50).lr_decay_iters == 40
    assert Schedule(args(**epochs), 50).lr_decay_iters == 50
    assert Schedule(args(**(epochs | {"lr_decay_iters": 30})), 50).lr_decay_iters == 30


@pytest.mark.parametrize("warmup", [0.001, 0.01, 0.02, 0.1, 0.5])
@pytest.mark.parametrize("iterations", [1, 2, 30])
def test_no_rate_is_above_the_peak(warmup: float, iterations: int) -> None:
    """A warm-up of a share of one step: 3.3e-3 for a peak of 1e-3 with 0.01 of 30 iterations."""
    args = Case().neox(world_size=1, warmup=warmup, train_iters=iterations, lr_decay_style="cosine")
    schedule = Schedule(args, iterations)
    rates = [schedule.learning_rate(iteration) for iteration in range(iterations)]
    assert max(rates) <= args.lr
    assert min(rates) > 0


def test_a_run_shorter_than_its_checkpoint() -> None:
    args = Case().neox(world_size=1, train_iters=10)
    check_length(10, 10, args)
    with pytest.raises(ConfigError, match="stands at iteration 20, train_iters is 10") as caught:
        check_length(20, 10, args)
    assert "--train_iters N" in str(caught.value)
    check_length(20, 30, args)  # as the message says
    check_length(0, 10, args)  # or anew, with finetune
