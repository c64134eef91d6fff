"""Derived values: widths, ranks, batches, precision, and what DeepSpeed gets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.neox_arguments import ConfigError, NeoXArgs
from megatron.neox_arguments.host_cpu import native_bf16_cpu
from megatron.neox_arguments.keys import precision
from tests.support.configurations import ROPE, VALID, keys

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("given_width", "multiple", "true_width"),
    [
        (86016, 1, 28672),
        (43008, 1, 14336),
        (159744, 1, 53248),
        (32768, 256, 11008),
        (40960, 256, 13824),
        (65536, 256, 22016),
        (14336, 14336, 14336),
    ],
)
def test_the_neox_convention_equals_gpt_neox(given_width: int, multiple: int, true_width: int) -> None:
    """Pairs computed by GPT-NeoX itself; 14336 with mlp_multiple_of 14336 is a trick of its users."""
    args = NeoXArgs.from_dict(
        keys(
            hidden_size=16384,
            intermediate_size=given_width,
            mlp_multiple_of=multiple,
            intermediate_size_convention="neox",
        )
    )
    assert args.intermediate_size == true_width


def test_widths_that_gpt_neox_makes_inconsistent_stop() -> None:
    with pytest.raises(ConfigError, match="first MLP matrix of 9558 rows and a second of 4778 columns, which do not"):
        NeoXArgs.from_dict(keys(hidden_size=4096, intermediate_size=14336, intermediate_size_convention="neox"))


def test_kv_heads_default_to_heads() -> None:
    assert NeoXArgs.from_dict(keys(num_kv_heads=None)).num_kv_heads == 8


@pytest.mark.parametrize(
    ("changes", "argument", "expected"),
    [
        ({}, None, 4),
        ({}, 8, 8),
        ({"global_num_gpus": 16}, None, 16),
        ({"num_nodes": 2, "num_gpus": 8}, None, 16),
        ({"num_nodes": -1, "num_gpus": 8}, None, 8),
        ({"pipe_parallel_size": 0}, None, 2),
    ],
)
def test_world_size(changes: dict, argument: int | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's number is passed in; variables that a batch script exports for other programs are not read."""
    monkeypatch.setenv("WORLD_SIZE", "12")
    args = NeoXArgs.from_dict(keys(**{"model_parallel_size": 2, "pipe_parallel_size": 2} | changes), argument)
    assert args.global_num_gpus == expected
    assert args.data_parallel_size * args.model_parallel_size * args.pipe_parallel_size == expected


@pytest.mark.parametrize(
    ("changes", "argument", "message"),
    [
        ({"model_parallel_size": 2, "pipe_parallel_size": 2}, 6, "6 ranks cannot be divided"),
        ({"global_num_gpus": 8}, 4, "4 ranks were started, but"),
        ({"global_num_gpus": 8, "num_gpus": 4}, None, "global_num_gpus 8 is not num_nodes 1 x num_gpus 4"),
    ],
)
def test_ranks_that_do_not_add_up(changes: dict, argument: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NeoXArgs.from_dict(keys(**changes), argument)


def batch(data: int, **changes: Any) -> tuple[int, int, int]:
    none = {"train_batch_size": None, "train_micro_batch_size_per_gpu": None, "gradient_accumulation_steps": None}
    args = NeoXArgs.from_dict(keys(**none | changes), data)
    return args.train_batch_size, args.train_micro_batch_size_per_gpu, args.gradient_accumulation_steps


@given(
    micro=st.integers(1, 8),
    steps=st.integers(1, 8),
    data=st.integers(1, 8),
    left_out=st.sampled_from(["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", ""]),
)
def test_any_two_of_the_three_batch_sizes_give_the_third(micro: int, steps: int, data: int, left_out: str) -> None:
    whole = {
        "train_batch_size": micro * steps * data,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
    }
    assert batch(data, **{**whole, left_out: None} if left_out else whole) == (micro * steps * data, micro, steps)


def test_one_of_the_three_is_enough() -> None:
    assert batch(4, train_micro_batch_size_per_gpu=2) == (8, 2, 1)
    assert batch(4, train_batch_size=16) == (16, 4, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "the batch size is missing"),
        ({"gradient_accumulation_steps": 4}, "the batch size is missing"),
        ({"train_batch_size": 10}, "gradient_accumulation_steps 1 x data_parallel_size 4 = 4; 8 is"),
        ({"train_batch_size": 10, "train_micro_batch_size_per_gpu": 2}, "not a multiple of micro-batch 2 x data"),
        (
            {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4},
            r"train_batch_size 16 is not micro-batch 2 x gradient_accumulation_steps 4 x data_parallel_size 4 = 32",
        ),
    ],
)  # fmt: skip
def test_batches_that_do_not_add_up(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        batch(4, **changes)


def test_decay_length() -> None:
    assert NeoXArgs.from_dict(VALID).lr_decay_iters == 10
    assert NeoXArgs.from_dict(keys(lr_decay_fraction=0.8)).lr_decay_iters == 8
    assert NeoXArgs.from_dict(keys(lr_decay_iters=7)).lr_decay_iters == 7


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "fp32"),
        ({"bf16": {"enabled": True}}, "bfloat16"),
        ({"fp16": {"enabled": False}}, "fp32"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"precision": "fp16"}, "fp16"),
        ({"precision": "FP16"}, "fp16"),
        ({"bf16": {"enabled": False}}, "fp32"),
        ({"precision": "bfloat16"}, "bfloat16"),
        ({"precision": "auto", "distributed_backend": "nccl"}, "bfloat16"),
        ({"precision": "auto", "bf16": {"enabled": True}}, "bfloat16"),
    ],
)
def test_precision(changes: dict, expected: str) -> None:
    assert NeoXArgs.from_dict(keys(**changes)).precision == expected


@pytest.mark.parametrize(("flags", "expected"), [("avx2 avx512_bf16", "bfloat16"), ("avx2 avx512f", "fp32")])
def test_auto_precision_on_a_cpu_follows_its_instructions(
    flags: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor : 0\nflags\t\t: fpu {flags} sse\n")
    monkeypatch.setattr(precision, "native_bf16_cpu", lambda: native_bf16_cpu(info))
    args = NeoXArgs.from_dict(keys(precision="auto"))
    assert args.precision == expected
    assert any(note.startswith(f"precision auto: {expected}") for note in args.notes)


def test_a_machine_without_cpuinfo_is_taken_as_slow(tmp_path: Path) -> None:
    assert not native_bf16_cpu(tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "half"}, "precision: given 'half'"),
        ({"precision": "bfloat16", "fp16": {"enabled": True}}, "precision is bfloat16, but the mapping of fp16 is en"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16 and fp16 are both enabled"),
        ({"precision": "fp32", "bf16": {"enabled": True}}, "precision is fp32, but the mapping of bfloat16 is enabled"),
    ],
)
def test_contradicting_precisions_stop(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NeoXArgs.from_dict(keys(**changes))


def test_deepspeed_always_gets_clipping_and_fp32_accumulation() -> None:
    """GPT-NeoX omits values equal to its defaults, and thereby turned clipping off (gpt-neox #1432)."""
    config = NeoXArgs.from_dict(keys(precision="bfloat16")).deepspeed_config
    assert config["gradient_clipping"] == 1.0
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["bf16"] == {"enabled": True}
    assert config["zero_optimization"]["stage"] == 1
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (8, 2)
    assert "bf16" not in NeoXArgs.from_dict(VALID).deepspeed_config


def test_deepspeed_timers_have_an_interval() -> None:
    """Without `steps_per_print` DeepSpeed 0.19 fails in the first step of a run with `wall_clock_breakdown`."""
    assert NeoXArgs.from_dict(keys(wall_clock_breakdown=True, log_interval=7)).deepspeed_config["steps_per_print"] == 7
    assert "steps_per_print" not in NeoXArgs.from_dict(VALID).deepspeed_config


def test_sequence_parallelism_on_one_tensor_rank_is_disabled_with_a_note() -> None:
    alone = NeoXArgs.from_dict(keys(sequence_parallel=True))
    assert not alone.sequence_parallel
    assert "pipeline" not in alone.deepspeed_config
    assert any("sequence_parallel has no effect with model_parallel_size 1" in note for note in alone.notes)
    two = NeoXArgs.from_dict(keys(sequence_parallel=True, model_parallel_size=2))
    assert two.sequence_parallel
    assert two.deepspeed_config["pipeline"] == {"pipe_partitioned": False, "grad_partitioned": False}
    assert not any("sequence_parallel" in note for note in two.notes)


def test_either_key_selects_recomputation() -> None:
    assert NeoXArgs.from_dict(VALID).recompute == "none"
    assert NeoXArgs.from_dict(keys(checkpoint_activations=True)).recompute == "full"
    assert NeoXArgs.from_dict(keys(recompute="full")).checkpoint_activations
    with pytest.raises(ConfigError, match="recompute: full contradicts checkpoint_activations: false"):
        NeoXArgs.from_dict(keys(recompute="full", checkpoint_activations=False))
    for other in ("none", "selective"):
        with pytest.raises(ConfigError, match=f"recompute: {other} contradicts checkpoint_activations: true"):
            NeoXArgs.from_dict(keys(recompute=other, checkpoint_activations=True, engine="megatron"))


def test_recompute_as_gpt_neox_generates_has_no_effect() -> None:
    args = NeoXArgs.from_dict(keys(recompute=True))
    assert args.recompute == "none"
    assert any("without effect here: recompute (generate.py" in note for note in args.notes)
    assert NeoXArgs.from_dict(keys(recompute=False, checkpoint_activations=True)).recompute == "full"


def test_overlap_follows_the_engine() -> None:
    def overlapped(**changes: Any) -> tuple[bool, bool]:
        args = NeoXArgs.from_dict(keys(**changes))
        return args.overlap_grad_reduce, args.overlap_param_gather

    assert overlapped() == (False, False)
    assert overlapped(engine="megatron") == (True, True)
    assert overlapped(engine="megatron", overlap_grad_reduce=False) == (False, False)
    assert overlapped(engine="megatron", overlap_param_gather=False) == (True, False)


def test_other_programs_read_the_files_of_an_interleaved_run() -> None:
    """At their own layout: the rules on virtual stages apply to training only."""
    given = keys(engine="megatron", virtual_pipe_parallel_size=2, from_scratch=None, load="runs/a")
    assert NeoXArgs.from_dict(given, task="eval").virtual_pipe_parallel_size == 2


def test_deepspeed_gets_the_loss_scaling_that_was_asked_for() -> None:
    scaling = {"loss_scale": 0, "initial_scale_power": 12, "loss_scale_window": 5, "hysteresis": 1, "min_loss_scale": 1}
    config = NeoXArgs.from_dict(keys(fp16={"fp16": True, "enabled": True} | scaling)).deepspeed_config
    assert config["fp16"] == {"enabled": True, "consecutive_hysteresis": False} | scaling
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "bf16" not in config


def test_extra_options_reach_deepspeed() -> None:
    config = NeoXArgs.from_dict(
        keys(deepspeed_extra_args={"timers": {"throughput": {"enabled": False}}})
    ).deepspeed_config
    assert config["timers"] == {"throughput": {"enabled": False}}


def test_rope_type_default_means_no_scaling() -> None:
    assert NeoXArgs.from_dict(keys(rope_scaling={"rope_type": "default"})).rope_scaling is None


def test_the_old_spelling_of_rope_type_is_read() -> None:
    old = {("type" if name == "rope_type" else name): value for name, value in ROPE.items()}
    assert NeoXArgs.from_dict(keys(rope_scaling=old)).rope_scaling == NeoXArgs.from_dict(VALID).rope_scaling


def test_optional_keys_are_filled_in() -> None:
    args = NeoXArgs.from_dict(VALID)
    for name, field in NeoXArgs.model_fields.items():
        if isinstance(field.json_schema_extra, dict) and "x-derived" in field.json_schema_extra:
            assert getattr(args, name) is not None, name


def test_merged_contains_the_keys_of_the_user() -> None:
    args = NeoXArgs.from_dict({"vocab-file": "t.json", **VALID})
    assert args.merged == {"vocab_file": "t.json", **VALID}


def test_replace_checks_again() -> None:
    args = NeoXArgs.from_dict(VALID)
    assert args.replace(train_iters=3).train_iters == 3
    with pytest.raises(ConfigError, match="min_lr"):
        args.replace(min_lr=1.0)
    assert args.train_iters == 10


def test_arguments_do_not_change() -> None:
    with pytest.raises(Exception, match="frozen"):
        NeoXArgs.from_dict(VALID).train_iters = 3


def test_json_brings_back_the_same_object() -> None:
    args = NeoXArgs.from_dict(keys(precision="auto", bf16={"enabled": True}), 4)
    again = NeoXArgs.from_json(args.to_json())
    assert (again, again.merged, again.notes, again.digest) == (args, args.merged, args.notes, args.digest)
    assert NeoXArgs.from_dict(keys(seed=2), 4).digest != args.digest


def test_no_heavy_import() -> None:
    """A login node can check a configuration without torch, which also makes --help and --print-config fast."""
    code = (
        "import sys, deepy, megatron.launcher, megatron.neox_arguments.schema\n"
        "heavy = {'torch', 'deepspeed', 'megatron.core', 'numpy', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])
