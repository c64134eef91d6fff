"""Parts of the trainer that need no ranks: the guard against a random start, save points and metrics."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from megatron.checkpoint.state import TrainState
from megatron.common.log import log_on_rank_0
from megatron.engine.nonfinite import SuspiciousLossError
from megatron.engine.protocol import Counters, StepResult
from megatron.trainer.initial_loss import check_initial_loss
from megatron.trainer.metrics import Metrics
from megatron.trainer.saves import is_save_point
from tests.support.models import Case

pytestmark = pytest.mark.unit


def test_a_continued_run_must_not_start_at_a_random_models_loss() -> None:
    args = Case(vocab=4096).neox(world_size=1, from_scratch=False, load="somewhere", finetune=True)
    check_initial_loss(math.log(4096) - 2.01, args)
    with pytest.raises(SuspiciousLossError, match=r"the first loss .* is 8\.30.*convert_hf verify"):
        check_initial_loss(8.30, args)
    check_initial_loss(8.30, args.replace(allow_high_initial_loss=True))
    check_initial_loss(8.30, Case(vocab=4096).neox(world_size=1))  # from scratch


def test_save_points(tmp_path: Path) -> None:
    args = Case().neox(world_size=1, save=str(tmp_path), checkpoint_factor=4, extra_save_iters=[1], train_iters=10)
    assert [n for n in range(11) if is_save_point(args, n, 10)] == [1, 4, 8, 10]
    assert is_save_point(args.replace(extra_save_iters=[0]), 0, 10)
    assert not is_save_point(Case().neox(world_size=1), 4, 10)


@pytest.mark.parametrize(
    ("factor", "points"),
    [(2, [1, 2, 4, 8, 16, 32]), (1.5, [1, 2, 3, 5, 7, 11, 17, 25, 38, 57]), (10, [1, 10])],
)
def test_save_points_at_powers(tmp_path: Path, factor: float, points: list[int]) -> None:
    """Expected values are from GPT-NeoX's `is_save_iter`."""
    args = Case().neox(world_size=1, save=str(tmp_path), checkpoint_factor=factor, checkpoint_scale="log")
    assert [n for n in range(60) if is_save_point(args, n, 1000)] == points


def test_metrics_go_to_jsonl_and_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = Case().neox(
        world_size=1, log_interval=2, log_dir=str(tmp_path / "log"), tensorboard_dir=str(tmp_path / "tb"), train_iters=3
    )
    log_on_rank_0(0)
    metrics = Metrics(args, rank=0, train_iters=3)
    result = StepResult(loss=1.5, grad_norm=0.5, applied=True)
    for iteration in (1, 2, 3):
        state = TrainState(iteration, 8 * iteration)
        metrics.step(state, result, learning_rate=1e-3, learned_tokens=7, counters=Counters())
    metrics.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[0].split()[1] for line in lines] == ["2/3", "3/3"]
    for part in ("loss 1.5000", "lr 1.000e-03", "grad norm 0.500", "tokens/s", "TFLOP/s per rank (Megatron formula)"):
        assert part in lines[0]
    records = [json.loads(line) for line in (tmp_path / "log/metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in records] == [1, 2, 3]
    assert "runtime/tokens_per_sec" in records[1]
    names = ("runtime/samples_per_sec", "runtime/steps_per_sec", "runtime/flops_per_sec_per_gpu")
    assert [name in records[0] or name not in records[1] for name in names] == [False] * 3
    assert re.search(r"\| lm_loss: 1\.500000E\+00 \| number of skipped iterations:   0 \| number of nan", lines[0])
    assert list((tmp_path / "tb").iterdir())
    silent = Metrics(args, rank=1, train_iters=3)
    silent.step(TrainState(1), result, 1.0, 1, Counters())
    assert capsys.readouterr().out == ""
