"""The global batch of a run that continues with another number of replicas: kept, requested, or impossible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.manifest import Manifest
from megatron.checkpoint.saved import SavedCheckpoint
from megatron.checkpoint.start import Start
from megatron.common.errors import ConfigError
from megatron.neox_arguments import NeoXArgs
from megatron.trainer.global_batch import keep_global_batch
from tests.support.models import Case

pytestmark = pytest.mark.unit

SAVED = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 6}


def arguments(dp: int, **keys: Any) -> NeoXArgs:
    return Case().neox(world_size=dp, **(SAVED | keys))


def saved(restored: Any = "everything", dp: int = 4, **provenance: Any) -> Start:
    body = {"layout": {"tp": 1, "pp": 1, "dp": dp}, "config": SAVED} | provenance
    return Start(SavedCheckpoint(Path("global_step5"), Manifest({}, body)), restored)


@pytest.mark.parametrize("restored", ["everything", "weights and position"])
@pytest.mark.parametrize(("dp", "steps"), [(4, 6), (3, 8), (8, 3), (1, 24)])
def test_accumulation_follows_from_the_saved_batch(dp: int, steps: int, restored: Any) -> None:
    for start in (saved(restored, train_batch_size=48), saved(restored)):  # recorded, or derived from the keys
        args = keep_global_batch(arguments(dp), start)
        assert (args.train_batch_size, args.gradient_accumulation_steps) == (48, steps)
        assert args.deepspeed_config["gradient_accumulation_steps"] == steps
        assert args.merged == arguments(dp).merged


def test_the_recorded_batch_is_kept_on_a_second_resume() -> None:
    """The recorded batch counts, not the batch that the keys give at the layout of the save."""
    args = keep_global_batch(arguments(2), saved(dp=3, train_batch_size=48))
    assert (args.train_batch_size, args.gradient_accumulation_steps) == (48, 12)


@pytest.mark.parametrize(
    "change", [{"train_batch_size": 12, "gradient_accumulation_steps": None}, {"gradient_accumulation_steps": 2}]
)
def test_another_batch_that_is_asked_for_is_made(change: dict) -> None:
    assert keep_global_batch(arguments(3, **change), saved()).train_batch_size == 12


def test_a_smaller_micro_batch_keeps_the_batch() -> None:
    args = keep_global_batch(arguments(3, train_micro_batch_size_per_gpu=1), saved())
    assert (args.train_batch_size, args.gradient_accumulation_steps) == (48, 16)


def test_runs_that_do_not_continue_have_their_own() -> None:
    assert keep_global_batch(arguments(3), Start()).train_batch_size == 36
    assert keep_global_batch(arguments(3), saved("weights")).train_batch_size == 36


def test_a_batch_that_does_not_fill_virtual_stages_says_what_to_change() -> None:
    """48 sequences are eight micro-batches of two on each of three replicas, but three on each of eight."""
    interleaved = {
        "engine": "megatron",
        "num_layers": 4,
        "pipe_parallel_size": 2,
        "virtual_pipe_parallel_size": 2,
    }

    def at(replicas: int, **keys: Any) -> NeoXArgs:
        return Case().neox(world_size=2 * replicas, **(SAVED | interleaved | keys))

    assert keep_global_batch(at(3), saved()).gradient_accumulation_steps == 8
    with pytest.raises(ConfigError, match="accumulation 3 of micro-batch 2 x data_parallel_size 8; with virtual") as e:
        keep_global_batch(at(8), saved())
    assert "data_parallel_size is one of 1, 2, 3, 4, 6, 12, change" in str(e.value)
    for change in ({"train_micro_batch_size_per_gpu": 1}, {"virtual_pipe_parallel_size": 1}):
        assert keep_global_batch(at(8, **change), saved()).train_batch_size == 48


def test_a_batch_that_cannot_be_split_says_what_to_change() -> None:
    with pytest.raises(
        ConfigError, match="global batch of 48 sequences, which is not a multiple of micro-batch 2 x"
    ) as e:
        keep_global_batch(arguments(5), saved())
    assert "data_parallel_size is one of 1, 2, 3, 4, 6, 8, or change train_micro_batch_size_per_gpu" in str(e.value)
    with pytest.raises(ConfigError, match=r"train_batch_size 48 is not a multiple of .* = 10; 50 is") as e:
        arguments(5, train_batch_size=48, gradient_accumulation_steps=None)
    assert "so that data_parallel_size is 4 or 6" in str(e.value)
