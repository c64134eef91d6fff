"""Following the message of a broken rule literally makes the configuration valid."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megatron.neox_arguments import ConfigError, NeoXArgs
from megatron.neox_arguments.keys.all_keys import REGISTRY
from megatron.neox_arguments.load import apply_overrides, parse_overrides
from tests.support.configurations import IMAGES, ROPE, VALID, keys

pytestmark = pytest.mark.unit

MEGATRON: dict[str, Any] = {"engine": "megatron"}
INTERLEAVED: dict[str, Any] = {**MEGATRON, "pipe_parallel_size": 2, "virtual_pipe_parallel_size": 2}
OPTIMIZER = {"type": "AdamW", "params": {"lr": 3.0e-5, "betas": [0.9, 0.95], "eps": 1.0e-8}}
LORA = {"lora": {"rank": 4, "alpha": 8}}
# rule; changes to the valid keys; advice in the message; changes that follow it (None deletes a key)
FOLLOWED: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("heads_divide_hidden", {"num_attention_heads": 12}, "change one of them", {"num_attention_heads": 8}),
    ("kv_heads_divide_heads", {"num_kv_heads": 3}, "num_kv_heads 3 does not divide", {"num_kv_heads": 2}),
    ("width_is_true", {"intermediate_size": 1056}, "Write intermediate_size: 352", {"intermediate_size": 352}),
    (
        "width_is_true", {"intermediate_size": 1056}, "leave intermediate_size_convention out",
        {"intermediate_size_convention": None},
    ),
    ("mlp_multiple_divides_width", {"mlp_multiple_of": 256}, "leave mlp_multiple_of out", {"mlp_multiple_of": None}),
    (
        "rope_frequencies_are_ordered", {"rope_scaling": {**ROPE, "low_freq_factor": 4.0}}, "Llama-3.1: 1.0 and 4.0",
        {"rope_scaling": {**ROPE, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ),
    ("positions_cover_sequence", {"seq_length": 2048}, "shorten seq_length", {"seq_length": 1024}),
    ("tensors_divide_by_tensor_parallelism", {"model_parallel_size": 8}, "num_kv_heads 4", {"model_parallel_size": 4}),
    ("every_stage_has_a_layer", {"pipe_parallel_size": 5}, "use at most 4", {"pipe_parallel_size": 4}),
    (
        "device_fits_backend", {"distributed_backend": "nccl", "device": "cpu"}, "write distributed_backend: gloo",
        {"distributed_backend": "gloo"},
    ),
    ("nodes_hold_whole_numbers_of_ranks", {"num_nodes": 2}, "num_nodes 2", {"num_nodes": 1}),
    ("zero_stage_is_one", {"zero_optimization": {"stage": 3}}, "write stage: 1", {"zero_optimization": {"stage": 1}}),
    ("recomputation_is_of_layers", {"recompute_layers": 2}, "give both", {"checkpoint_activations": True}),
    ("recomputation_is_of_layers", {"recompute_layers": 2}, "or neither", {"recompute_layers": None}),
    (
        "recomputation_is_of_layers", {"recompute_layers": 5, "checkpoint_activations": True},
        "leave it out to recompute all", {"recompute_layers": None},
    ),
    (
        "selective_recomputation_is_of_engine_megatron", {"recompute": "selective"}, "write engine: megatron",
        {"engine": "megatron"},
    ),
    (
        "selective_recomputation_is_of_engine_megatron", {"recompute": "selective"}, "checkpoint_activations: true ins",
        {"recompute": None, "checkpoint_activations": True},
    ),
    (
        "virtual_stages_are_of_engine_megatron", {"pipe_parallel_size": 2, "virtual_pipe_parallel_size": 2},
        "write engine: megatron", {"engine": "megatron"},
    ),
    (
        "virtual_stages_are_of_a_pipeline", {**MEGATRON, "virtual_pipe_parallel_size": 2},
        "leave virtual_pipe_parallel_size out", {"virtual_pipe_parallel_size": None},
    ),
    (
        "every_virtual_stage_has_a_layer", {**INTERLEAVED, "virtual_pipe_parallel_size": 3},
        "at most virtual_pipe_parallel_size: 2", {"virtual_pipe_parallel_size": 2},
    ),
    (
        "micro_batches_fill_virtual_stages", {**INTERLEAVED, "gradient_accumulation_steps": 3}, "use 4",
        {"gradient_accumulation_steps": 4},
    ),
    (
        "overlapping_is_of_engine_megatron", {"overlap_grad_reduce": True, "overlap_param_gather": False},
        "write engine: megatron", {"engine": "megatron"},
    ),
    (
        "gathering_overlaps_with_reducing",
        {**MEGATRON, "overlap_grad_reduce": False, "overlap_param_gather": True}, "write overlap_grad_reduce: true",
        {"overlap_grad_reduce": True},
    ),
    (
        "gathering_overlaps_with_reducing",
        {**MEGATRON, "overlap_grad_reduce": False, "overlap_param_gather": True}, "leave overlap_param_gather out",
        {"overlap_param_gather": None},
    ),
    (
        "engine_megatron_deals_decoder_layers", {**INTERLEAVED, "pipe_partition_method": "uniform"},
        "write pipe_partition_method: type:transformer|mlp", {"pipe_partition_method": "type:transformer|mlp"},
    ),
    (
        "engine_megatron_has_no_loss_scale", {**MEGATRON, "precision": "fp16"}, "write precision: bfloat16",
        {"precision": "bfloat16"},
    ),
    (
        "options_of_deepspeed_reach_it", {**MEGATRON, "deepspeed_extra_args": {"memory_breakdown": True}},
        "write engine: deepspeed",
        {"engine": "deepspeed"},
    ),
    ("training_has_a_length", {"train_iters": None}, "train_epochs, passes", {"train_epochs": 1.0}),
    ("training_has_a_length", {"train_epochs": 1.0}, "keep one", {"train_iters": None}),
    ("training_has_an_optimizer", {"optimizer": None}, "write optimizer: {type: AdamW", {"optimizer": OPTIMIZER}),
    ("samples_have_a_length", {"seq_length": None}, "the number of tokens per sample", {"seq_length": 16}),
    ("floor_is_below_peak", {"min_lr": 2e-3}, "lower min_lr", {"min_lr": 1e-4}),
    (
        "decay_length_is_given_once", {"lr_decay_iters": 5, "lr_decay_fraction": 0.5}, "keep one",
        {"lr_decay_iters": None},
    ),
    ("warmup_is_given_once", {"warmup": 0.1, "lr_warmup_iters": 5}, "keep one", {"warmup": None}),
    (
        "wsd_has_one_cooldown", {"lr_decay_style": "wsd"}, "write lr_wsd_decay_iters: 0 for a run that is only",
        {"lr_wsd_decay_iters": 0},
    ),
    ("wsd_has_one_cooldown", {"lr_wsd_decay_iters": 2}, "leave it out", {"lr_wsd_decay_iters": None}),
    (
        "schedule_fits", {"lr_decay_style": "wsd", "lr_wsd_decay_iters": 2, "lr_warmup_iters": 9}, "raise train_iters",
        {"train_iters": 11},
    ),
    ("schedule_fits", {"lr_restart_iter": 10}, "raise train_iters", {"train_iters": 11}),
    (
        "extra_args_do_not_collide", {"deepspeed_extra_args": {"gradient_clipping": 0.1}}, "write it at top level",
        {"deepspeed_extra_args": None, "gradient_clipping": 0.1},
    ),
    ("one_source_of_data", {"data_path": "x"}, "keep one way", {"train_data_paths": None}),
    ("training_has_data", {"train_data_paths": None}, "give train_data_paths", {"train_data_paths": ["a"]}),
    ("training_has_data", {"train_data_paths": None}, "data_path with split", {"data_path": "a", "split": "9,1"}),
    ("weights_match_paths", {"train_data_weights": [0.0]}, "not all zero", {"train_data_weights": [1.0]}),
    (
        "replay_leaves_something", {"train_data_paths": [{"path": "a", "replay": {"share": 0.5}}]},
        "leave some share to at least one",
        {"train_data_paths": ["b", {"path": "a", "replay": {"share": 0.5}}]},
    ),
    (
        "labels_match_paths", {"train_label_data_paths": ["x", "y"]}, "2 entries for 1 train_data_paths",
        {"train_label_data_paths": ["x"]},
    ),
    ("document_ends_are_known", {"eod_mask_loss": True}, "give vocab_file", {"vocab_file": "tokenizer.json"}),
    (
        "chopping_has_an_effect", {"allow_chopped": False}, "choose pack_until_overflow, unpacked or best_fit",
        {"pack_impl": "best_fit"},
    ),
    (
        "skipped_ranges_are_ranges", {"skip_sample_ranges": [[6, 5]]}, "write [first, end] with 0 <= first < end",
        {"skip_sample_ranges": [[5, 6]]},
    ),
    (
        "a_step_ends_before_its_collectives", {"step_timeout_minutes": 30.0}, "lower it",
        {"step_timeout_minutes": 10.0},
    ),
    (
        "a_step_ends_before_its_collectives", {"step_timeout_minutes": 30.0}, "raise distributed_timeout_minutes",
        {"distributed_timeout_minutes": 60},
    ),
    ("a_profile_has_steps_ranks_and_a_folder", {"profile": True}, "profile needs log_dir", {"log_dir": "x"}),
    (
        "a_profile_has_steps_ranks_and_a_folder", {"profile": True, "log_dir": "x", "profile_ranks": [1]},
        "[1] do not exist; ranks are 0 to 0", {"profile_ranks": [0]},
    ),
    ("start_is_given", {"from_scratch": None}, "give load (a checkpoint folder)", {"load": "runs/a"}),
    ("start_is_given", {"from_scratch": None}, "from_scratch: true", {"from_scratch": True}),
    ("start_is_given", {"load": "runs/a"}, "keep the one you mean", {"from_scratch": None}),
    ("saving_has_an_interval", {"save": "runs/a"}, "without checkpoint_factor", {"checkpoint_factor": 5}),
    ("saving_has_an_interval", {"save": "runs/a"}, "extra_save_iters", {"extra_save_iters": [5]}),
    (
        "sequence_divides_by_tensor_parallelism",
        {"model_parallel_size": 4, "sequence_parallel": True, "seq_length": 253}, "write seq_length: 256",
        {"seq_length": 256},
    ),
    (
        "order_of_gpt_neox_is_of_packed_sources", {"data_order": "gpt-neox", "pack_impl": "best_fit"},
        "not for pack_impl: best_fit", {"pack_impl": "packed"},
    ),
    (
        "weights_are_given_once",
        {
            "weight_by_num_documents": True,
            "train_data_paths": ["a", {"path": "b", "replay": {"share": 0.2}}],
        },
        "weight_by_num_documents and replay are mutually exclusive", {"weight_by_num_documents": None},
    ),
    ("factor_fits_the_scale", {"checkpoint_factor": 2.5}, "checkpoint_scale: log", {"checkpoint_scale": "log"}),
    ("factor_fits_the_scale", {"checkpoint_factor": 2.5}, "is not a whole number", {"checkpoint_factor": 2}),
    ("vocabulary_has_a_source", {"vocab_size": None}, "give vocab_file", {"vocab_size": 64}),
    (
        "patches_go_with_their_modality", {"patches": IMAGES["patches"]}, "or leave patches out", {"patches": None},
    ),
    ("patches_go_with_their_modality", {"patches": IMAGES["patches"]}, "write modality: patches", IMAGES),
    ("images_have_no_text", {**IMAGES, "vocab_size": 4096}, "leave them out", {"vocab_size": None}),
    ("images_have_a_scale", {**IMAGES, "patches": {"size": 8}}, "or write normalise: patch", IMAGES),
    (
        "images_have_a_scale", {**IMAGES, "patches": {"size": 8}}, "give mean and std",
        {"patches": {"size": 8, "mean": [127.5], "std": [50.0]}},
    ),
    ("iteration_needs_load", {"iteration": 5}, "leave it out", {"iteration": None}),
    ("adapters_have_a_trained_base", LORA, "give load, the base", {"from_scratch": None, "load": "runs/a"}),
    (
        "adapters_are_saved_elsewhere",
        LORA | {"from_scratch": None, "load": "runs/a", "save": "runs/a", "checkpoint_factor": 1},
        "give another save folder", {"save": "runs/b"},
    ),
    (
        "every_stage_has_an_adapter",
        LORA | {
            "from_scratch": None, "load": "runs/a", "pipe_parallel_size": 2, "pipe_partition_method": "uniform"
        },
        "write type:transformer|mlp", {"pipe_partition_method": "type:transformer|mlp"},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "broken", "advice", "done"), FOLLOWED)
def test_the_advice_of_a_rule_works(rule: str, broken: dict[str, Any], advice: str, done: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=re.escape(advice)):
        NeoXArgs.from_dict(keys(**broken))
    NeoXArgs.from_dict(keys(**(broken | done)))


def test_no_rule_is_left_out() -> None:
    """All rules of training; some rules of other tasks follow."""
    assert {entry.name for entry in REGISTRY.rules if "train" in entry.tasks} == {rule for rule, *_ in FOLLOWED}
    for task in ("eval", "generate"):
        with pytest.raises(ConfigError, match="give load, the folder of a checkpoint"):
            NeoXArgs.from_dict(keys(from_scratch=None), task=task)  # type: ignore[arg-type]
        with_load = keys(from_scratch=None, load="runs/a", vocab_file="tokenizer.json")
        NeoXArgs.from_dict(with_load, task=task)  # type: ignore[arg-type]
    prompts = {"from_scratch": None, "load": "runs/a", "text_gen_type": "input-file", "vocab_file": "tokenizer.json"}
    with pytest.raises(ConfigError, match="needs sample_input_file"):
        NeoXArgs.from_dict(keys(**prompts), task="generate")
    NeoXArgs.from_dict(keys(**prompts, sample_input_file="prompts.txt"), task="generate")


def followed(message: str, **base: Any) -> NeoXArgs:
    """The configuration with the options that a message names, as typed behind the command."""
    options = re.search(r"(--\w+ .*?)(?=$|;|,|\.( |$)|\))", message)
    assert options, message
    merged, places = keys(**base), dict[str, str]()
    apply_overrides(merged, places, parse_overrides(options[1].replace("FOLDER", "runs/a").split()))
    return NeoXArgs.from_dict({name: value for name, value in merged.items() if value is not None})


def test_options_named_by_a_rule_can_be_typed() -> None:
    with pytest.raises(ConfigError) as caught:
        NeoXArgs.from_dict(keys(iteration=5))
    assert followed(str(caught.value), iteration=5).load == "runs/a"


def test_all_problems_are_named_at_once() -> None:
    """Unknown and unsupported keys, types, contradictions between keys and rules, in one message."""
    wrong = keys(
        num_layerz=3,  # unknown
        moe_num_experts=8,  # not supported
        hidden_size="wide",  # of another type
        train_batch_size=7,  # contradicts micro-batch and accumulation
        min_lr=1.0,  # above the peak
        save="runs/a",  # without an interval
    )
    with pytest.raises(ConfigError) as caught:
        NeoXArgs.from_dict(wrong)
    said = str(caught.value)
    for text in ("num_layerz", "moe_num_experts", "hidden_size: given 'wide'", "train_batch_size 7", "min_lr 1.0"):
        assert text in said, said
    assert "without checkpoint_factor" in said
    assert said.startswith("6 things are wrong:\n"), said


def test_a_wrong_key_does_not_make_others_look_wrong() -> None:
    """Rules that read it are skipped: only the key itself is reported."""
    for name in VALID:
        with pytest.raises(ConfigError) as caught:
            NeoXArgs.from_dict(keys(**{name: {"no": "such"}}))
        problems = [line for line in str(caught.value).splitlines() if "things are wrong" not in line]
        assert problems
        assert all(name in problem for problem in problems), problems
