"""docs/engines.md: its configuration is accepted, and its table matches the current engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron.neox_arguments import NeoXArgs
from tests.support.configurations import keys
from tests.support.documentation import code_blocks

pytestmark = pytest.mark.unit

GUIDE = "docs/engines.md"


def test_its_configuration_is_accepted() -> None:
    (block,) = code_blocks(GUIDE, "yaml")
    large = {
        "num_layers": 80,
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "num_kv_heads": 8,
        "intermediate_size": 28672,
    }
    args = NeoXArgs.from_dict(keys(**large | yaml.safe_load(block)), world_size=64)
    assert args.overlap_grad_reduce
    assert args.overlap_param_gather
    assert args.virtual_pipe_parallel_size == 5


@pytest.mark.slow
def test_its_table_matches_the_engine() -> None:
    from benchmarks.engine_idle import simulated

    text = (Path(__file__).resolve().parents[2] / GUIDE).read_text()
    assert "\n".join(simulated()) in text
