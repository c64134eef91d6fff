"""A run saved at one TP x PP x DP goes on at another: the same state to the bit, the losses of the run that went on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.verify import verify_checkpoint
from tests.support.checkpoint_runs import STOP
from tests.support.layouts import Layout, resume_elsewhere, save_and_go_on, whole_state
from tests.support.models import Case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

# 61 vocabulary rows are stored as 61, 62 or 64 at TP 1, 2 and 4.
ODD = Case(heads=4, kv_heads=4, head_dim=8, layers=4, intermediate=40, vocab=61, seq=16)
GROUPED = replace(ODD, heads=8, head_dim=4)
TIED = replace(ODD, tied=True)
TOLERANCE = 1e-6


def ranks_of(layout: Layout) -> int:
    tp, pp, dp = layout
    return tp * pp * dp


def check(
    case: Case, precision: str, saved: Layout, running: Layout, folder: Path, tolerance: float = TOLERANCE
) -> None:
    went_on = run_ranks(save_and_go_on, ranks_of(saved), case, saved, precision, str(folder / "first"))
    resumed = run_ranks(
        resume_elsewhere, ranks_of(running), case, running, precision, str(folder / "first"), str(folder / "again")
    )
    checkpoints = [folder / name / f"global_step{STOP}" for name in ("first", "again")]
    assert [verify_checkpoint(checkpoint) for checkpoint in checkpoints] == [[], []]
    before, after = map(whole_state, checkpoints)
    assert before.keys() == after.keys()
    assert [key for key, tensor in before.items() if not torch.equal(tensor, after[key])] == []
    found, expected = torch.tensor(resumed[0][0]), torch.tensor(went_on[0])
    print(saved, running, ((found - expected) / expected).abs().max())
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    text = "saved at TP{} PP{} DP{}, running at TP{} PP{} DP{}".format(*saved, *running)
    assert (text in resumed[0][1]) == (saved != running)


@pytest.mark.parametrize(
    ("case", "precision", "saved", "running"),
    [
        pytest.param(ODD, "fp32", (2, 2, 2), (1, 4, 1), id="tp2-pp2-dp2 to pp4"),
        pytest.param(TIED, "fp32", (1, 1, 2), (4, 2, 1), id="tied, dp2 to tp4-pp2"),
        pytest.param(GROUPED, "bfloat16", (2, 1, 2), (2, 2, 1), id="bf16, grouped, dp2 to pp2"),
    ],
)
def test_another_layout(case: Case, precision: str, saved: Layout, running: Layout, tmp_path: Path) -> None:
    check(case, precision, saved, running, tmp_path)
