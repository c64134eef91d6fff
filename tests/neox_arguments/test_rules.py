"""Every rule between keys: a configuration that breaks this one alone, and what the user reads."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megatron.neox_arguments import ConfigError, NeoXArgs, checks
from tests.support.configurations import ROPE, VALID, keys

pytestmark = pytest.mark.unit

# rule, what is changed in the valid keys, what the message says
BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("heads_divide_hidden", {"num_attention_heads": 12}, "hidden_size 128 is not num_attention_heads 12 x an even"),
    ("kv_heads_divide_heads", {"num_kv_heads": 3}, "num_kv_heads 3 does not divide num_attention_heads 8"),
    ("width_is_true", {"intermediate_size": 1056}, "Write intermediate_size: 352"),
    ("mlp_multiple_divides_width", {"mlp_multiple_of": 256}, "mlp_multiple_of 256 does not divide"),
    ("whole_head_rotates", {"rotary_pct": 0.25}, "Llama rotates the whole head"),
    ("rope_frequencies_are_ordered", {"rope_scaling": {**ROPE, "low_freq_factor": 4.0}}, "must be below high_freq"),
    ("attention_is_dense", {"attention_config": [[["flash", "local"], 4]]}, "local not supported"),
    ("positions_cover_sequence", {"seq_length": 2048}, "seq_length 2048 is longer than max_position_embeddings 1024"),
    ("tensors_divide_by_tensor_parallelism", {"model_parallel_size": 8}, "8 does not divide num_kv_heads 4"),
    ("tensors_divide_by_tensor_parallelism", {"model_parallel_size": 3}, "3 does not divide num_attention_heads 8"),
    ("tensors_divide_by_tensor_parallelism", {"model_parallel_size": 4, "intermediate_size": 350}, "intermediate_size"),
    ("every_stage_has_a_layer", {"pipe_parallel_size": 5}, "a stage would have no layer; use at most 4"),
    ("device_fits_backend", {"distributed_backend": "nccl", "device": "cpu"}, "write distributed_backend: gloo"),
    ("nodes_hold_whole_numbers_of_ranks", {"num_nodes": 2}, "1 ranks cannot be spread evenly over num_nodes 2"),
    ("zero_stage_is_one", {"zero_optimization": {"stage": 0}}, "stage 0 clips gradients wrongly"),
    ("zero_stage_is_one", {"zero_optimization": {"stage": 2}}, "stage 2 splits gradients or weights"),
    ("zero_stage_is_one", {"zero_optimization": {"stage": 3}}, "write stage: 1"),
    ("recomputation_is_of_layers", {"recompute_layers": 2}, "without checkpoint_activations: true"),
    ("recomputation_is_of_layers", {"recompute_layers": 5, "checkpoint_activations": True}, "has at most 4"),
    ("training_has_a_length", {"train_iters": None}, "train_iters is missing"),
    ("training_has_an_optimizer", {"optimizer": None}, "optimizer is missing"),
    ("samples_have_a_length", {"seq_length": None}, "seq_length is missing"),
    ("floor_is_below_peak", {"min_lr": 2e-3}, "min_lr 0.002 is above the peak learning rate 0.001"),
    ("one_word_on_decay_length", {"lr_decay_iters": 5, "lr_decay_fraction": 0.5}, "both given; keep one"),
    ("extra_args_do_not_collide", {"deepspeed_extra_args": {"gradient_clipping": 0.1}}, "gradient_clipping would ov"),
    ("extra_args_do_not_collide", {"deepspeed_extra_args": {"bfloat16": {"enabled": True}}}, "bfloat16 would override"),
    ("one_source_of_data", {"data_path": "x"}, "data_path and train_data_paths exclude each other"),
    ("training_has_data", {"train_data_paths": None}, "no training data"),
    ("weights_match_paths", {"train_data_weights": [1.0, 2.0]}, "2 entries for 1 train_data_paths"),
    ("weights_match_paths", {"train_data_weights": [0.0]}, "not all zero"),
    (
        "replay_leaves_something",
        {"train_data_paths": [{"path": "a", "replay": {"share": 0.5}}]},
        "sum to 0.5 and 0 sources have no replay",
    ),
    ("labels_match_paths", {"valid_label_data_paths": ["x"]}, "1 entries for 0 valid_data_paths"),
    ("document_ends_are_known", {"eod_mask_loss": True}, "needs the end-of-document token: give vocab_file"),
    ("chopping_has_an_effect", {"allow_chopped": False}, "no effect with pack_impl: packed"),
    ("skipped_ranges_are_ranges", {"skip_sample_ranges": [[0, 8], [9, 9]]}, "[9, 9] is no range of samples"),
    ("skipped_ranges_are_ranges", {"skip_sample_ranges": [[1, 2, 3]]}, "[1, 2, 3] is no range of samples"),
    (
        "a_step_ends_before_its_collectives",
        {"step_timeout_minutes": 30.0},
        "step_timeout_minutes 30 is not below distributed_timeout_minutes 30: a collective would give up before",
    ),
    ("a_profile_has_steps_ranks_and_a_folder", {"profile": True}, "profile needs log_dir"),
    (
        "a_profile_has_steps_ranks_and_a_folder",
        {"profile": True, "log_dir": "x", "profile_step_start": 12},
        "profile_step_start 12 is not below profile_step_stop 12",
    ),
    (
        "a_profile_has_steps_ranks_and_a_folder",
        {"profile": True, "log_dir": "x", "profile_ranks": [0, 1]},
        "profile_ranks: [1] of 1 ranks do not exist",
    ),
    ("start_is_named", {"from_scratch": None}, "There is no silent random start"),
    ("start_is_named", {"load": "runs/a"}, "load and from_scratch exclude each other"),
    ("saving_has_a_rhythm", {"save": "runs/a"}, "nothing would say when to save"),
    ("iteration_needs_load", {"iteration": 5}, "load, its folder, is not given"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "changes", "message"), BROKEN)
def test_a_broken_rule_is_said_alone(rule: str, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        NeoXArgs.from_dict(keys(**changes))
    assert "things are wrong" not in str(caught.value), "the case should break one rule"


@pytest.mark.parametrize(("rule", "changes", "message"), BROKEN)
def test_without_the_rule_the_case_passes(
    rule: str, changes: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The case is caught by its own rule: taking the rule away lets it through."""
    monkeypatch.setattr(checks, "RULES", [entry for entry in checks.RULES if entry[1].__name__ != rule])
    NeoXArgs.from_dict(keys(**changes))


def test_every_rule_has_a_case() -> None:
    tested = {rule for rule, _, _ in BROKEN} | {"weights_are_named"}
    assert {function.__name__ for _, function in checks.RULES} == tested


def test_valid_keys_pass() -> None:
    args = NeoXArgs.from_dict(VALID)
    assert args.notes == ("save is not given: this run leaves no checkpoint",)


def test_all_broken_rules_are_said_at_once() -> None:
    with pytest.raises(ConfigError, match="3 things are wrong") as caught:
        NeoXArgs.from_dict(keys(min_lr=1.0, seq_length=4096, zero_optimization={"stage": 2}))
    assert all(word in str(caught.value) for word in ("min_lr", "seq_length", "stage 2"))


@pytest.mark.parametrize("task", ["eval", "generate"])
def test_programs_that_read_weights_need_them(task: Any) -> None:
    with pytest.raises(ConfigError, match="nothing to evaluate: give load"):
        NeoXArgs.from_dict(VALID, task=task)


def test_evaluation_needs_no_optimizer() -> None:
    changes = {"optimizer": None, "train_iters": None, "from_scratch": None, "train_data_paths": None, "load": "runs/a"}
    assert NeoXArgs.from_dict(keys(**changes), task="eval").load == "runs/a"


def test_the_historic_width_of_the_70b_is_refused_with_the_right_number() -> None:
    with pytest.raises(ConfigError, match="Write intermediate_size: 28672"):
        NeoXArgs.from_dict(keys(hidden_size=8192, num_attention_heads=64, num_kv_heads=8, intermediate_size=86016))


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"pipe_parallel_size": 3}, "some stages hold 2 layers, some 1"),
        ({"max_position_embeddings": 131072, "rope_scaling": None}, "rope_scaling is absent"),
        ({"attention_config": [[["flash"], "all"]]}, "attention_config has no effect"),
        ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, "overlap_comm has no effect"),
        ({"merge_file": "merges.txt"}, "merge_file has no effect"),
        ({"pipe_parallel_size": 0}, "pipe_parallel_size 0 (GPT-NeoX's sequential model) is taken as 1"),
    ],
)
def test_legal_surprises_are_noted(changes: dict, note: str) -> None:
    assert any(note in line for line in NeoXArgs.from_dict(keys(**changes)).notes)
