"""Log output for GPT-NeoX dashboards: the same numbers, fields and names."""

from __future__ import annotations

import re

import pytest

from megatron.neox_arguments import NeoXArgs
from megatron.trainer.gpt_neox_log import evaluation_line, flops_per_second, interval_fields
from tests.support.configurations import keys

pytestmark = pytest.mark.unit


def args(**changes: object) -> NeoXArgs:
    batch = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4}
    return NeoXArgs.from_dict(keys(**batch, **changes), world_size=8)


def test_flops_equal_gpt_neox() -> None:
    """Expected values are from its `get_actual_flops` and `human_readable_flops`, for a batch of 32 on 8 ranks."""
    assert flops_per_second(args(checkpoint_activations=True), 0.25) == 47244640256.0
    assert flops_per_second(args(), 0.25) == 35433480192.0
    assert "approx flops per GPU: 35.4GFLOPS" in interval_fields(args(), 0.25, 1e-3, [1.0], None, 0, 0)


def test_the_fields_are_those_that_scripts_look_for() -> None:
    """Patterns as in public log parsers of GPT-NeoX and Megatron."""
    line = "iteration     20/100 | " + interval_fields(args(), 0.5, 2e-4, [2.0, 3.0], 65536.0, skipped=3, not_finite=1)
    patterns = {
        r"iteration\s+(\d+)/\s*\d+ \|": "20",
        r"samples/sec: ([\d.]+) \|": "64.000",
        r"elapsed time per iteration \(ms\): ([\d.]+) \|": "500.0",
        r"learning rate: ([\dE.+-]+) \|": "2.000E-04",
        r"lm_loss: ([\dE.+-]+) \|": "2.500000E+00",
        r"loss scale: ([\d.]+) \|": "65536.0",
        r"number of skipped iterations:\s+(\d+) \|": "3",
        r"number of nan iterations:\s+(\d+)": "1",
    }
    found = {pattern: re.search(pattern, line) for pattern in patterns}
    assert {pattern: match and match[1] for pattern, match in found.items()} == patterns
    assert "loss scale" not in interval_fields(args(), 0.5, 2e-4, [], None, 0, 0)
    assert "lm_loss value: 2.500000E+00 | lm_loss_ppl value: 1.218249E+01 |" in evaluation_line(
        "validation", 7, {"lm_loss": 2.5, "lm_loss_ppl": 12.18249}
    )
