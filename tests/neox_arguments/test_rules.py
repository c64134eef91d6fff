"""Every rule and warning of the keys: a configuration that breaks only this one, and its message."""

from __future__ import annotations

import importlib
import pkgutil
import re
from typing import Any

import pytest

from megatron.neox_arguments import ConfigError, NeoXArgs
from megatron.neox_arguments import keys as key_files
from megatron.neox_arguments.keys import embeddings, evaluation
from megatron.neox_arguments.keys.all_keys import REGISTRY
from tests.support.configurations import IMAGES, ROPE, VALID, keys

pytestmark = pytest.mark.unit


def replayed(path: str, share: float) -> dict[str, Any]:
    """An entry of train_data_paths with replay."""
    return {"path": path, "replay": {"share": share}}


MEGATRON: dict[str, Any] = {"engine": "megatron"}
INTERLEAVED: dict[str, Any] = {**MEGATRON, "pipe_parallel_size": 2, "virtual_pipe_parallel_size": 2}
LORA = {"lora": {"rank": 4, "alpha": 8}, "from_scratch": None, "load": "runs/a"}


WSD = {"lr_decay_style": "wsd", "lr_wsd_decay_iters": 2}

# rule, changes to the valid keys, part of the message
BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("heads_divide_hidden", {"num_attention_heads": 12}, "hidden_size 128 is not num_attention_heads 12 x an even"),
    ("kv_heads_divide_heads", {"num_kv_heads": 3}, "num_kv_heads 3 does not divide num_attention_heads 8"),
    ("width_is_true", {"intermediate_size": 1056}, "Write intermediate_size: 352"),
    ("vocabulary_has_a_source", {"vocab_size": None}, "the vocabulary size is unknown: give vocab_file"),
    ("mlp_multiple_divides_width", {"mlp_multiple_of": 256}, "mlp_multiple_of 256 does not divide"),
    ("rope_frequencies_are_ordered", {"rope_scaling": {**ROPE, "low_freq_factor": 4.0}}, "must be below high_freq"),
    ("positions_cover_sequence", {"seq_length": 2048}, "seq_length 2048 is longer than max_position_embeddings 1024"),
    ("tensors_divide_by_tensor_parallelism", {"model_parallel_size": 8}, "8 does not divide num_kv_heads 4"),
    ("tensors_divide_by_tensor_parallelism", {"model_parallel_size": 3}, "3 does not divide num_attention_heads 8"),
    ("tensors_divide_by_tensor_parallelism", {"model_parallel_size": 4, "intermediate_size": 350}, "intermediate_size"),
    (
        "sequence_divides_by_tensor_parallelism",
        {"model_parallel_size": 4, "sequence_parallel": True, "seq_length": 253},
        "write seq_length: 256",
    ),
    (
        "sequence_divides_by_tensor_parallelism",
        {"model_parallel_size": 4, "sequence_parallel": True, "seq_length": 1022, "max_position_embeddings": 1022},
        "write seq_length: 1020",
    ),
    ("patches_go_with_their_modality", {"patches": {"size": 8, "normalise": "patch"}}, "but modality is text"),
    ("patches_go_with_their_modality", {"completion": {"count": 3}}, "completion continues images, but modality"),
    ("images_have_no_text", {**IMAGES, "vocab_size": 4096}, "vocab_size: not available with modality: patches, only"),
    ("images_have_no_text", {**IMAGES, "isolate_documents": True}, "isolate_documents: not available with modality"),
    ("images_have_a_scale", {**IMAGES, "patches": {"size": 8}}, "patches.mean is not known: with normalise: none give"),
    ("images_have_a_scale", {**IMAGES, "patches": {**IMAGES["patches"], "std": [1.0]}}, "no effect with normalise"),
    (
        "images_have_a_scale",
        {**IMAGES, "patches": {"size": 8, "mean": [1.0, 2.0], "std": [1.0]}},
        "expected one number, or one for each of 3 channels",
    ),
    ("every_stage_has_a_layer", {"pipe_parallel_size": 5}, "a stage would have no layer; use at most 4"),
    ("adapters_have_a_trained_base", {"lora": {"rank": 4, "alpha": 8}}, "but from_scratch would draw them at random"),
    (
        "adapters_are_saved_elsewhere",
        LORA | {"save": "runs/../runs/a", "checkpoint_factor": 1},
        "give another save folder",
    ),
    (
        "every_stage_has_an_adapter",
        LORA | {"pipe_parallel_size": 2, "pipe_partition_method": "parameters"},
        "write type:transformer|mlp",
    ),
    ("device_fits_backend", {"distributed_backend": "nccl", "device": "cpu"}, "write distributed_backend: gloo"),
    ("nodes_hold_whole_numbers_of_ranks", {"num_nodes": 2}, "1 ranks cannot be spread evenly over num_nodes 2"),
    ("zero_stage_is_one", {"zero_optimization": {"stage": 2}}, "stage 2 splits gradients or weights"),
    ("zero_stage_is_one", {"zero_optimization": {"stage": 3}}, "write stage: 1"),
    ("recomputation_is_of_layers", {"recompute_layers": 2}, "without checkpoint_activations: true"),
    ("recomputation_is_of_layers", {"recompute_layers": 5, "checkpoint_activations": True}, "has at most 4"),
    ("selective_recomputation_is_of_engine_megatron", {"recompute": "selective"}, "which recomputes whole layers only"),
    ("training_has_a_length", {"train_iters": None}, "or train_epochs, passes over the data"),
    ("training_has_a_length", {"train_epochs": 1.0}, "train_iters and train_epochs are both given"),
    ("training_has_an_optimizer", {"optimizer": None}, "optimizer is missing"),
    ("samples_have_a_length", {"seq_length": None}, "seq_length is missing"),
    ("floor_is_below_peak", {"min_lr": 2e-3}, "min_lr 0.002 is above the peak learning rate 0.001"),
    ("decay_length_is_given_once", {"lr_decay_iters": 5, "lr_decay_fraction": 0.5}, "both given; keep one"),
    ("warmup_is_given_once", {"warmup": 0.1, "lr_warmup_iters": 5}, "both given; keep one"),
    ("wsd_has_one_cooldown", {"lr_decay_style": "wsd"}, "but 0 are given"),
    ("wsd_has_one_cooldown", {**WSD, "lr_wsd_decay_fraction": 0.1}, "but 2 are given"),
    ("wsd_has_one_cooldown", {"lr_wsd_decay_iters": 2}, "lr_wsd_decay_iters applies to lr_decay_style: wsd"),
    ("wsd_has_one_cooldown", {"lr_wsd_decay_style": "cosine"}, "lr_wsd_decay_style applies to lr_decay_style: wsd"),
    ("schedule_fits", {**WSD, "lr_warmup_iters": 9}, "a warm-up of 9 and a cooldown of 2 iterations do not fit"),
    ("schedule_fits", {"lr_restart_iter": 10}, "lr_restart_iter 10 is not before the schedule's end at iteration 10"),
    ("extra_args_do_not_collide", {"deepspeed_extra_args": {"gradient_clipping": 0.1}}, "gradient_clipping would ov"),
    ("extra_args_do_not_collide", {"deepspeed_extra_args": {"bfloat16": {"enabled": True}}}, "bfloat16 would override"),
    (
        "extra_args_do_not_collide",
        {
            "model_parallel_size": 2,
            "sequence_parallel": True,
            "deepspeed_extra_args": {"pipeline": {"pipe_partitioned": True}},
        },
        "pipeline would override",
    ),
    ("virtual_stages_are_of_engine_megatron", {"pipe_parallel_size": 2, "virtual_pipe_parallel_size": 2}, "engine: m"),
    ("virtual_stages_are_of_a_pipeline", {**MEGATRON, "virtual_pipe_parallel_size": 2}, "no pipeline to fill"),
    ("every_virtual_stage_has_a_layer", {**INTERLEAVED, "virtual_pipe_parallel_size": 3}, "pipe_parallel_size: 2"),
    ("micro_batches_fill_virtual_stages", {**INTERLEAVED, "gradient_accumulation_steps": 3}, "in groups of 2; use 4"),
    ("overlapping_is_of_engine_megatron", {"overlap_grad_reduce": True, "overlap_param_gather": False}, "is empty"),
    ("overlapping_is_of_engine_megatron", {"overlap_param_gather": True}, "param_gather: not available with eng"),
    (
        "gathering_overlaps_with_reducing",
        {**MEGATRON, "overlap_grad_reduce": False, "overlap_param_gather": True},
        "gathers with the buckets that it reduces with",
    ),
    (
        "engine_megatron_deals_decoder_layers",
        {**INTERLEAVED, "pipe_partition_method": "parameters"},
        "parameters is not available with engine: megatron, which distributes",
    ),
    (
        "engine_megatron_deals_decoder_layers",
        {**INTERLEAVED, "pipe_partition_method": "type:transformer|embedding"},
        "write pipe_partition_method: type:transformer|mlp",
    ),
    ("engine_megatron_has_no_loss_scale", {**MEGATRON, "precision": "fp16"}, "loss scaling is DeepSpeed's"),
    (
        "options_of_deepspeed_reach_it",
        {**MEGATRON, "deepspeed_extra_args": {"memory_breakdown": True}},
        "memory_breakdown has no effect with engine: megatron",
    ),
    ("one_source_of_data", {"data_path": "x"}, "data_path and train_data_paths are mutually exclusive"),
    ("training_has_data", {"train_data_paths": None}, "no training data"),
    ("weights_match_paths", {"train_data_weights": [1.0, 2.0]}, "2 entries for 1 train_data_paths"),
    ("weights_match_paths", {"train_data_weights": [0.0]}, "not all zero"),
    ("weights_match_paths", {"train_data_weights": []}, "0 entries for 1 train_data_paths"),
    ("weights_match_paths", {"train_data_paths": ["a", "b"], "train_data_weights": [1, -0.5]}, "must be finite, n"),
    ("weights_match_paths", {"train_data_weights": [float("nan")]}, "train_data_weights [nan]"),
    ("weights_match_paths", {"train_data_paths": ["a", "b"], "train_data_weights": [float("inf"), 1]}, "[inf, 1"),
    (
        "weights_match_paths",
        {"train_data_paths": ["a", replayed("b", 0.2)], "train_data_weights": [1.0, 2.0]},
        "2 entries for 1 train_data_paths without replay",
    ),
    ("replay_leaves_something", {"train_data_paths": [replayed("a", 0.5)]}, "sum to 0.5, sources without replay: 0"),
    (
        "replay_leaves_something",
        {"train_data_paths": ["a", replayed("b", 0.6), replayed("c", 0.4)]},
        "sum to 1, sources without replay: 1",
    ),
    ("labels_match_paths", {"train_data_paths": ["a", "b"], "train_label_data_paths": ["x"]}, "1 entries for 2 train"),
    ("labels_match_paths", {"valid_label_data_paths": ["x"]}, "1 entries for 0 valid_data_paths"),
    ("document_ends_are_known", {"eod_mask_loss": True}, "needs the end-of-document token: give vocab_file"),
    ("chopping_has_an_effect", {"allow_chopped": False}, "no effect with pack_impl: packed"),
    (
        "order_of_gpt_neox_is_of_packed_sources",
        {"data_order": "gpt-neox", "pack_impl": "best_fit", "train_iters": None, "train_epochs": 1.0},
        "not for pack_impl: best_fit, train_epochs",
    ),
    (
        "weights_are_given_once",
        {"weight_by_num_documents": True, "train_data_paths": ["a", replayed("b", 0.2)]},
        "weight_by_num_documents and replay are mutually exclusive",
    ),
    ("skipped_ranges_are_ranges", {"skip_sample_ranges": [[0, 8], [9, 9]]}, "[9, 9] is not a range of samples"),
    ("skipped_ranges_are_ranges", {"skip_sample_ranges": [[6, 5]]}, "[6, 5] is not a range of samples"),
    ("skipped_ranges_are_ranges", {"skip_sample_ranges": [[-1, 3]]}, "[-1, 3] is not a range of samples"),
    ("skipped_ranges_are_ranges", {"skip_sample_ranges": [[1, 2, 3]]}, "[1, 2, 3] is not a range of samples"),
    (
        "a_step_ends_before_its_collectives",
        {"step_timeout_minutes": 30.0},
        "step_timeout_minutes 30 is not below distributed_timeout_minutes 30: a collective would time out before",
    ),
    ("a_profile_has_steps_ranks_and_a_folder", {"profile": True}, "profile needs log_dir or tensorboard_dir"),
    (
        "a_profile_has_steps_ranks_and_a_folder",
        {"profile": True, "log_dir": "x", "profile_step_start": 12},
        "profile_step_start 12 is not below profile_step_stop 12",
    ),
    (
        "a_profile_has_steps_ranks_and_a_folder",
        {"profile": True, "log_dir": "x", "profile_ranks": [0, 1]},
        "profile_ranks [1] do not exist; ranks are 0 to 0",
    ),
    ("start_is_given", {"from_scratch": None}, "A run never starts silently"),
    ("start_is_given", {"load": "runs/a"}, "load and from_scratch are mutually exclusive"),
    ("saving_has_an_interval", {"save": "runs/a"}, "which determine when to save"),
    ("factor_fits_the_scale", {"checkpoint_factor": 2.5}, "checkpoint_factor 2.5 is not a whole number of iterations"),
    ("factor_fits_the_scale", {"checkpoint_factor": 1, "checkpoint_scale": "log"}, "must be above 1, as saves are at"),
    ("iteration_needs_load", {"iteration": 5}, "neither load nor save is given"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "changes", "message"), BROKEN)
def test_only_the_broken_rule_is_reported(rule: str, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        NeoXArgs.from_dict(keys(**changes))
    assert "things are wrong" not in str(caught.value), "the case should break one rule"


@pytest.mark.parametrize(("rule", "changes", "message"), BROKEN)
def test_without_the_rule_the_case_passes(
    rule: str, changes: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The case is caught by its own rule: without that rule it passes."""
    monkeypatch.setattr(REGISTRY, "rules", [entry for entry in REGISTRY.rules if entry.name != rule])
    NeoXArgs.from_dict(keys(**changes))


# The sizes of Code Llama 7B, whose file in GPT-NeoX omits the width.
PUBLISHED_7B = {
    "num_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_kv_heads": 32,
    "intermediate_size": None,
    "intermediate_size_convention": None,
    "mlp_multiple_of": 256,
}

# warning, changes to the valid keys, part of the note
NOTED: list[tuple[str, dict[str, Any], str]] = [
    ("base_is_only_read", LORA | {"finetune": True}, "finetune has no effect with lora"),
    ("stages_are_uneven", {"pipe_parallel_size": 3}, "some stages hold 2 layers, some 1"),
    ("rope_scaling_is_forgotten", {"max_position_embeddings": 131072, "rope_scaling": None}, "rope_scaling is absent"),
    ("width_is_not_the_published_one", PUBLISHED_7B, "is not the 11008 of Llama-7B (1, 2 and Code Llama)"),
    ("mlp_biases_are_left_out", {"use_bias_in_mlp": None}, "GPT-NeoX's default true would add biases that no Llama"),
    ("accumulation_is_in_fp32", {"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype bf16 is taken as fp32"),
    ("deepspeed_keys_have_no_effect", {**MEGATRON, "wall_clock_breakdown": True}, "engine: megatron: wall_clock"),
    ("stages_are_uneven", {**INTERLEAVED, "num_layers": 5}, "2 x 2 virtual stages: some virtual stages hold 2"),
    ("layers_are_recomputed_one_by_one", {"checkpoint_num_layers": 4, "checkpoint_activations": True}, "taken as 1"),
    ("wandb_is_not_installed", {"use_wandb": True}, "nothing is logged there without pip install wandb"),
    ("wandb_is_not_switched_on", {"wandb_group": "a"}, "GPT-NeoX logs to Weights & Biases if it finds an API key"),
    ("merge_file_is_unused", {"merge_file": "merges.txt", "tokenizer_type": "HFTokenizer"}, "merge_file has no effect"),
    ("nothing_is_saved", {"async_save": True}, "writes no checkpoint, async_save has no effect"),
]  # fmt: skip


@pytest.mark.parametrize(("warning", "changes", "note"), NOTED)
def test_legal_surprises_are_noted(warning: str, changes: dict, note: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert any(note in line for line in NeoXArgs.from_dict(keys(**changes)).notes)
    monkeypatch.setattr(REGISTRY, "warnings", [entry for entry in REGISTRY.warnings if entry.name != warning])
    assert not any(note in line for line in NeoXArgs.from_dict(keys(**changes)).notes)


GENERATION = {"from_scratch": None, "load": "runs/a", "vocab_file": "tokenizer.json"}

BROKEN_GENERATION: list[tuple[str, dict[str, Any], str]] = [
    ("evaluated_adapters_are_given", {"lora": {"rank": 4, "alpha": 8}}, "there is no adapter to evaluate"),
    ("text_needs_a_vocabulary", {"vocab_file": None}, "give vocab_file, the tokenizer's file"),
    ("prompts_have_a_file", {"text_gen_type": "input-file"}, "text_gen_type input-file needs sample_input_file"),
    ("stop_strings_are_not_empty", {"stop": ["a", ""]}, "stop has an empty string"),
    ("stop_ids_are_in_the_vocabulary", {"stop_token_ids": [1, 999999]}, "stop_token_ids [999999] are not ids"),
    ("chat_keys_need_chat", {"thinking": True, "system_prompt": "x"}, "system_prompt, thinking without chat"),
    ("a_budget_is_of_a_trace", {"chat": True, "max_thinking_tokens": 9}, "without thinking: on"),
    (
        "thinking_has_a_budget_within_the_text",
        {"chat": True, "thinking": True, "max_thinking_tokens": 64, "maximum_tokens": 64},
        "no token would be left for the answer",
    ),
    ("chats_have_prompts", {"chat": True, "text_gen_type": "unconditional"}, "there is nothing to answer"),
]  # fmt: skip

NOTED_GENERATION: list[tuple[str, dict[str, Any], str]] = [
    ("prompts_are_not_read", {"text_gen_type": "interactive", "sample_input_file": "p.txt"}, "p.txt is not read"),
    ("greedy_ignores_limits", {"top_k": 3, "min_p": 0.1}, "top_k, min_p without effect: temperature is 0"),
    ("greedy_samples_are_equal", {"num_samples": 3}, "all 3 samples of a prompt will be equal"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "changes", "message"), BROKEN_GENERATION)
def test_a_broken_generation_rule_is_reported(
    rule: str, changes: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = keys(**GENERATION | changes)
    with pytest.raises(ConfigError, match=re.escape(message)):
        NeoXArgs.from_dict(given, task="generate")
    monkeypatch.setattr(REGISTRY, "rules", [entry for entry in REGISTRY.rules if entry.name != rule])
    NeoXArgs.from_dict(given, task="generate")


@pytest.mark.parametrize(("warning", "changes", "note"), NOTED_GENERATION)
def test_surprises_of_generation_are_noted(
    warning: str, changes: dict, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = keys(**GENERATION | changes)
    assert any(note in line for line in NeoXArgs.from_dict(given, task="generate").notes)
    monkeypatch.setattr(REGISTRY, "warnings", [entry for entry in REGISTRY.warnings if entry.name != warning])
    assert not any(note in line for line in NeoXArgs.from_dict(given, task="generate").notes)


def test_what_is_continued_follows_from_what_is_given() -> None:
    expected = {"interactive": {"chat": True}, "input-file": {"sample_input_file": "p.txt"}, "unconditional": {}}
    for kind, changes in expected.items():
        assert NeoXArgs.from_dict(keys(**GENERATION | changes), task="generate").text_gen_type == kind
    both = {"chat": True, "sample_input_file": "p.jsonl"}
    assert NeoXArgs.from_dict(keys(**GENERATION | both), task="generate").text_gen_type == "input-file"


def test_every_rule_and_warning_has_a_case() -> None:
    elsewhere = {"weights_are_given"}  # holds for other tasks than training: test_programs_that_read_weights_need_them
    elsewhere |= {entry.name for entry in evaluation.registry.rules}  # test_evaluation_keys
    elsewhere |= {entry.name for entry in embeddings.registry.rules}  # test_embedding_keys
    elsewhere |= {"continued_images_are_given", "questions_are_text"}  # test_patch_keys
    generation = {rule for rule, _, _ in BROKEN_GENERATION}
    assert {entry.name for entry in REGISTRY.rules} == {rule for rule, _, _ in BROKEN} | elsewhere | generation
    noted = {warning for warning, _, _ in (*NOTED, *NOTED_GENERATION)}
    assert {entry.name for entry in REGISTRY.warnings} == noted


def test_registered_rules_are_run() -> None:
    """Rules in a key file whose registry is not included would never run."""
    modules = [
        importlib.import_module(f"{key_files.__name__}.{found.name}")
        for found in pkgutil.iter_modules(key_files.__path__)
    ]
    parts = [module.registry for module in modules if hasattr(module, "registry")]
    without = {module.__name__.rpartition(".")[2] for module in modules if not hasattr(module, "registry")}
    assert without == {"all_keys", "fields"}
    for kind in ("derivations", "rules", "warnings"):
        joined = [entry for part in parts for entry in getattr(part, kind)]
        assert sorted(entry.name for entry in joined) == sorted(entry.name for entry in getattr(REGISTRY, kind))
        assert len({entry.name for entry in joined}) == len(joined), "two functions of one name"


def test_valid_keys_pass() -> None:
    args = NeoXArgs.from_dict(VALID)
    assert args.notes == ("save is not given: this run writes no checkpoint",)


def test_all_broken_rules_are_reported_at_once() -> None:
    """Unknown keys, wrong values, contradictions and broken rules, in one round."""
    changes = {"min_lr": 1.0, "seq_length": 4096, "zero_optimization": {"stage": 2}, "hiden_size": 3, "seed": "a"}
    with pytest.raises(ConfigError, match="6 things are wrong") as caught:
        NeoXArgs.from_dict(keys(**changes, train_batch_size=3))
    words = ("min_lr", "seq_length", "stage 2", "unknown key hiden_size", "seed: given 'a'", "train_batch_size 3")
    assert all(word in str(caught.value) for word in words)


def test_rules_that_depend_on_a_wrong_key_are_skipped() -> None:
    """Only the first mistake is reported, not consequences of a guessed value."""
    with pytest.raises(ConfigError) as caught:
        NeoXArgs.from_dict(keys(hidden_size="128", num_kv_heads=None))
    assert (
        str(caught.value) == "hidden_size: given '128', but it should be a valid integer. Width of the residual stream."
    )
    with pytest.raises(
        ConfigError, match=r"^3 ranks cannot be divided into pipe_parallel_size 1 x model_parallel_size 2"
    ):
        NeoXArgs.from_dict(keys(model_parallel_size=2, global_num_gpus=3, num_nodes=7))


@pytest.mark.parametrize("task", ["eval", "generate", "mcq"])
def test_programs_that_read_weights_need_them(task: Any) -> None:
    with pytest.raises(ConfigError, match="nothing to evaluate: give load"):
        NeoXArgs.from_dict(VALID, task=task)


def test_evaluation_needs_no_optimizer() -> None:
    changes = {"optimizer": None, "train_iters": None, "from_scratch": None, "train_data_paths": None, "load": "runs/a"}
    assert NeoXArgs.from_dict(keys(**changes), task="eval").load == "runs/a"


def test_the_historic_width_of_the_70b_is_refused_with_the_right_number() -> None:
    """Under the convention in which the number is the width itself."""
    with pytest.raises(ConfigError, match="Write intermediate_size: 28672"):
        NeoXArgs.from_dict(keys(hidden_size=8192, num_attention_heads=64, num_kv_heads=8, intermediate_size=86016))


def test_problems_are_reported_in_the_order_of_the_groups() -> None:
    """The model first, because its problems often explain the rest."""
    changes = {"save": "x", "skip_sample_ranges": [[1]], "train_data_paths": None, "min_lr": 1.0, "num_nodes": 2}
    with pytest.raises(ConfigError) as caught:
        NeoXArgs.from_dict(keys(**changes, rope_scaling={**ROPE, "low_freq_factor": 4.0}))
    lines = str(caught.value).splitlines()[1:]
    expected = ["rope_scaling", "1 ranks", "min_lr", "no training data", "skip_sample_ranges", "save"]
    assert [line.startswith(f"  - {word}") for line, word in zip(lines, expected, strict=True)] == [True] * 6


def test_ranges_to_skip_are_checked_for_evaluation_too() -> None:
    with pytest.raises(ConfigError, match="is not a range of samples"):
        NeoXArgs.from_dict(keys(load="runs/a", skip_sample_ranges=[[3, 1]]), task="eval")


@pytest.mark.parametrize("task", ["eval", "generate"])
def test_other_programs_take_odd_sequences(task: Any) -> None:
    changes = {"model_parallel_size": 4, "sequence_parallel": True, "seq_length": 253, "load": "runs/a"}
    extra = {"vocab_file": "tokenizer.json", "from_scratch": None}
    assert NeoXArgs.from_dict(keys(**changes, **extra), task=task).seq_length == 253
