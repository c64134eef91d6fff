"""Learning rate: warm-up, decay, constant floor, and an operator's overrides; values computed by hand."""

import pytest

from megatron.neox_arguments import ConfigError, NeoXArgs
from megatron.trainer.schedule import Schedule, check_length, check_schedule
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
        ("cosine", 0, PEAK / 100),  # never zero: the first step already trains
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
    """GPT-NeoX's cosine rises again: to 56 % of the peak at one and a half times the decay."""
    run = args(lr_decay_style=style)
    end = learning_rate(run, 1000)
    assert [learning_rate(run, n) for n in (1001, 1500, 2000, 10**6)] == [end] * 4


WSD = {"lr_decay_style": "wsd", "warmup": None, "lr_warmup_iters": 100, "lr_wsd_decay_iters": 200}


@pytest.mark.parametrize(
    ("shape", "left"),  # fraction of peak minus floor left after a quarter of the cooldown
    [("linear", 0.75), ("cosine", 0.8535533905932737), ("exponential", 0.6817928305074291), ("minus_sqrt", 0.5)],
)
def test_wsd(shape: str, left: float) -> None:
    """Shapes worked out by hand: 1 - x, (1 + cos(pi x)) / 2, 2 x 0.5^x - 1 and 1 - sqrt(x) at x = 1/4."""
    run = args(**WSD, lr_wsd_decay_style=shape)
    assert [learning_rate(run, n) for n in (0, 50, 100, 101, 799, 800)] == [PEAK / 100, PEAK / 2, *[PEAK] * 4]
    assert learning_rate(run, 850) == pytest.approx(FLOOR + (PEAK - FLOOR) * left)
    assert [learning_rate(run, n) for n in (1000, 1001, 10**6)] == pytest.approx([FLOOR] * 3)
    rates = [learning_rate(run, n) for n in range(800, 1001)]
    assert rates == sorted(rates, reverse=True)


def test_wsd_ends_with_a_run_whose_length_the_data_give() -> None:
    by_share = {"lr_wsd_decay_iters": None, "lr_wsd_decay_fraction": 0.2, "lr_decay_iters": None, "lr_warmup_iters": 4}
    run = Schedule(args(**(WSD | by_share), train_iters=None, train_epochs=2.5), 50)
    assert [run.learning_rate(n) for n in (40, 45, 50)] == pytest.approx([PEAK, (PEAK + FLOOR) / 2, FLOOR])
    check_schedule(run, 0)
    with pytest.raises(ConfigError, match="warm-up of 45 and a cooldown of 10 iterations do not fit into the 50"):
        check_schedule(
            Schedule(args(**(WSD | by_share | {"lr_warmup_iters": 45}), train_iters=None, train_epochs=2.5), 50), 0
        )


@pytest.mark.parametrize("style", ["linear", "cosine", "constant", "wsd"])
def test_a_schedule_that_begins_anew(style: str) -> None:
    """From iteration 1,000 to 1,100: the warm-up counts from there and from the floor, and so does the decay."""
    again = {"lr_restart_iter": 1000, "lr_decay_iters": 1100, "warmup": None, "lr_warmup_iters": 10}
    cooldown = {"lr_wsd_decay_iters": 20} if style == "wsd" else {}
    run = args(**again, **cooldown, lr_decay_style=style)
    assert learning_rate(run, 1005) == pytest.approx((PEAK + FLOOR) / 2)
    assert learning_rate(run, 1010) == pytest.approx(PEAK)
    middle = {"linear": PEAK / 2, "cosine": (PEAK + FLOOR) / 2, "constant": PEAK, "wsd": PEAK}[style]
    assert learning_rate(run, 1055) == pytest.approx(middle)
    assert learning_rate(run, 1100) == pytest.approx({"linear": FLOOR, "constant": PEAK}.get(style, FLOOR))
    check_schedule(Schedule(run, 1100), 1000)
    with pytest.raises(ConfigError, match="lr_restart_iter 1000 is where the schedule of a continued run"):
        check_schedule(Schedule(run, 1100), 999)


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
