"""GPT-NeoX's keys that this project does not have: each with the reason, and the values that change nothing.

A neutral value is silently accepted, so that a GPT-NeoX Llama file can be used as it is; any other value is an error.
Keys in `WITHOUT_EFFECT` are accepted, because a run without them is correct; one note names those that are given.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from megatron.neox_arguments.keys.lora import QUANTIZED


class Refusal(NamedTuple):
    reason: str
    neutral: tuple[Any, ...] = (None,)

    def accepts(self, value: Any) -> bool:
        """Whether `value` changes nothing: one of the neutral ones, something empty, or a mapping that is off."""
        if isinstance(value, dict):
            return not value.get("enabled", bool(value))
        if value in ("", []):
            return True
        return any(value is item or (type(value) is type(item) and value == item) for item in self.neutral)


def _family(reason: str, *names: str, neutral: tuple[Any, ...] = (None, False)) -> dict[str, Refusal]:
    return {name: Refusal(reason, neutral) for name in names}


_NO_DROPOUT = (
    "Llama has no dropout, and the recomputation used here does not replay random states; only 0.0 is accepted."
)
_MOE = "Mixtures of experts are not supported: this project trains dense Llama models."
_MUP = "muP is not supported; set init_method_std and lr directly."
_MAMBA = "Mamba and RWKV layers are not supported: this project trains Llama models."
_TE = "TransformerEngine layers are not supported; `kernels` chooses fused operations."
_PREFERENCE = "Preference training (DPO, KTO, reward models, reinforce) is not supported; only train_impl: normal is."
_NODES = (
    "deepy.py uses all nodes of the Slurm allocation: choose them with Slurm's --nodelist and --exclude, and the "
    "number of ranks on each with num_gpus."
)
_DEEPSPEED = "This DeepSpeed feature is not supported; GPT-NeoX's Llama runs do without it."
_QUANTIZED = f"{QUANTIZED[0].upper()}{QUANTIZED[1:]}."
_PAIRS = [
    f"{side}_{part}_{kind}data_paths"
    for side in ("pos", "neg")
    for part in ("train", "valid", "test")
    for kind in ("", "label_")
]
_INTERNAL = "This is a derived value and cannot be given."

UNSUPPORTED: dict[str, Refusal] = {
    "context_parallel_size": Refusal("Context parallelism is not supported; shorten seq_length.", (None, 1)),
    "sliding_window_width": Refusal("Llama attends to the whole context; sliding windows are not supported."),
    "hidden_dropout": Refusal(_NO_DROPOUT, (None, 0, 0.0)),
    "attention_dropout": Refusal(_NO_DROPOUT, (None, 0, 0.0)),
    "use_qk_layernorm": Refusal("Llama does not normalize queries and keys.", (None, False)),
    "output_layer_parallelism": Refusal(
        "The output head is always split by rows of the vocabulary (column).", (None, "column")
    ),
    "attention_softmax_in_fp32": Refusal("The attention softmax is always computed in fp32.", (None, True, False)),
    "apply_query_key_layer_scaling": Refusal("Llama does not scale attention by the layer number.", (None, False)),
    "fp32_allreduce": Refusal("With bf16, gradients are always reduced in fp32.", (None, True, False)),
    "dataset_impl": Refusal(_PREFERENCE, (None, "gpt2")),
    "train_impl": Refusal(_PREFERENCE, (None, "normal")),
    "s3_path": Refusal("Checkpoints are written to a file system only."),
    "soft_prompt_tuning": Refusal("Prompt tuning is not supported."),
    "num_unique_layers": Refusal("Layers do not share parameters in Llama."),
    "sparsity_config": Refusal("Sparse attention is not supported: Llama's is dense."),
    **_family(_QUANTIZED, "load_in_4bit", "load_in_8bit", "quantization_config"),
    "use_bnb_optimizer": Refusal("bitsandbytes optimizers are not supported; AdamW is.", (None, False)),
    "scheduler": Refusal("Give lr_decay_style, warmup and min_lr at top level."),
    "amp": Refusal("apex amp is not supported; give precision."),
    "z_loss": Refusal("The z-loss is not supported.", (None, 0, 0.0)),
    "use_checkpoint_lr_scheduler": Refusal(
        "The schedule always comes from the configuration, also when a run is continued.", (None, False)
    ),
    "prompt_end": Refusal("A prompt is always one line.", (None, "\n")),
    "return_logits": Refusal("generate.py writes text only.", (None, False)),
    "precompute_model_name": Refusal("generate.py writes text only."),
    "char_level_ppl": Refusal("eval.py reports perplexity per token.", (None, False)),
    "communication_data_type": Refusal("With bf16, gradients are always reduced in fp32.", (None, "fp32", False)),
    "prescale_gradients": Refusal(
        "The loss is divided by the global token count, so there is nothing to scale.", (None, False)
    ),
    "gradient_predivide_factor": Refusal("The loss is divided by the global token count.", (None, 1, 1.0)),
    "zero_stage": Refusal("Give zero_optimization: {stage: 1}.", (None, 1)),
    "lr": Refusal("Give it as optimizer: {params: {lr: ...}}."),
    "batch_size": Refusal("Give train_micro_batch_size_per_gpu."),
    "use_shared_fs": Refusal("Data and checkpoints must be on a file system that all ranks share.", (None, True)),
    **_family(_MOE, "moe_num_experts", "moe_expert_interval", "moe_top_k", neutral=(None, 1)),
    **_family(_MOE, "moe_router_type", "moe_lbl_in_fp32", "moe_jitter_eps"),
    **_family(
        _MUP, "use_mup", "coord_check", "save_base_shapes", "base_shapes_file", "mup_init_scale", "mup_attn_temp"
    ),
    **_family(_MUP, "mup_output_temp", "mup_embedding_mult", "mup_rp_embedding_mult", "mup_width_scale"),
    **_family(_MAMBA, "mamba_selective_scan_fusion", "mamba_causal_conv_fusion", "mamba_inner_func_fusion"),
    **_family(_MAMBA, "mamba_selective_fp32_params", "mamba_use_bias_in_conv", "mamba_use_bias_in_linears"),
    **_family(_MAMBA, "dim_att", "head_size", "ffn_dim"),
    **_family(_TE, "te_columnparallel", "te_rowparallel", "te_layernorm_mlp", "te_mha", "te_fp8_mha", "te_fp8_format"),
    **_family(_TE, "te_fp8_wgrad", "te_fp8_amax_history_len", "te_fp8_amax_compute_algo", "te_fp8_margin"),
    **_family(_PREFERENCE, "train_reward_data_paths", "valid_reward_data_paths", "test_reward_data_paths"),
    **_family(_PREFERENCE, *_PAIRS),
    **_family(_PREFERENCE, "dpo_fp32", "dpo_reference_free", "dpo_beta", "kto_fp32", "kto_desirable_weight"),
    **_family(_PREFERENCE, "kto_undesirable_weight", "kto_beta", "fp32_reinforce", "kl_impl", "kl_div_beta"),
    **_family(_PREFERENCE, "reinforce_leave_one_out", "serve_model_weights", "weight_server_port"),
    **_family(_PREFERENCE, "online_dataserver_ips", "online_dataserver_ports"),
    **_family(_NODES, "include", "exclude"),
    "autotuning_run": Refusal("DeepSpeed's autotuning is not used; --dry-run --search ranks the layouts instead."),
    **_family(_DEEPSPEED, "curriculum_learning", "data_efficiency", "sparse_attention", "sparse_gradients"),
    **_family(_DEEPSPEED, "autotuning", "elasticity", "compression_training", "deepscale", "deepscale_config"),
    "deepspeed": Refusal("The key engine selects DeepSpeed or megatron-core.", (None, True)),
    "deepspeed_activation_checkpointing": Refusal(
        "checkpoint_activations turns recomputation on or off.", (None, True)
    ),
    "curriculum_seqlen": Refusal(_DEEPSPEED, (None, 0)),
    **_family(_INTERNAL, "padded_vocab_size", "world_size", "rank", "local_rank", "is_pipe_parallel", "user_script"),
    **_family(_INTERNAL, "dynamic_loss_scale", "zero_reduce_scatter", "zero_contiguous_gradients", "git_hash"),
    **_family(_INTERNAL, "zero_reduce_bucket_size", "zero_allgather_bucket_size", "config_files"),
    **_family(_INTERNAL, "do_train", "do_valid", "do_test"),
}

_FUSED = "`kernels` chooses fused operations"
_OTHER_NORM = "the norm is RMSNorm, whose epsilon is rms_norm_epsilon"
_NEVER_READ = "GPT-NeoX does not use it either"
_RECOMPUTE = "it concerns memory and timing of recomputation, not the results"
_START = "in a Slurm allocation deepy.py itself starts all nodes with srun, elsewhere the ranks of this machine"
_WRITERS = "TensorBoard, metrics.jsonl and Weights & Biases (wandb_* keys) are written"
_NOT_LOGGED = "it is not logged"
_IN_FP16 = "it is set in the fp16 mapping"

WITHOUT_EFFECT: dict[str, str] = {
    **dict.fromkeys(("rmsnorm_fusion", "layernorm_fusion", "rope_fusion", "use_flashattn_swiglu"), _FUSED),
    **dict.fromkeys(("scaled_upper_triang_masked_softmax_fusion", "scaled_masked_softmax_fusion"), _FUSED),
    **dict.fromkeys(("bias_gelu_fusion", "bias_dropout_fusion"), "Llama has no biases to fuse"),
    "fused_kernels_build_path": _FUSED,
    **dict.fromkeys(("layernorm_epsilon", "scalenorm_epsilon"), _OTHER_NORM),
    "use_bias_in_norms": "RMSNorm has no bias, and GPT-NeoX does not use it either",
    **dict.fromkeys(("partition_activations", "contiguous_checkpointing", "checkpoint_in_cpu"), _RECOMPUTE),
    **dict.fromkeys(("synchronize_each_layer", "profile_backward", "activation_checkpointing"), _RECOMPUTE),
    **dict.fromkeys(("hostfile", "deepspeed_slurm", "deepspeed_mpi", "no_ssh_check", "force_multi"), _START),
    **dict.fromkeys(("master_addr", "master_port", "lazy_mpu_init"), _START),
    **dict.fromkeys(("comment", "account"), "the job gets them from sbatch or salloc"),
    **dict.fromkeys(("hysteresis", "loss_scale_window", "min_scale", "loss_scale"), _IN_FP16),
    "clip_grad": "gradient_clipping bounds the norm, in GPT-NeoX too",
    "fp16_lm_cross_entropy": "the loss is always computed in fp32",
    **dict.fromkeys(("short_seq_prob", "adlr_autoresume", "adlr_autoresume_interval", "onnx_safe"), _NEVER_READ),
    "no_save_optim": "GPT-NeoX never reads it; keep_optimizer_last_n: 0 keeps weights only",
    "checkpoint_validation_with_forward_pass": "checkpoints are verified by checksums and by accounting for "
    "every tensor",
    "checkpoint": "checkpoints are written by this project, not by DeepSpeed",
    "gpt_j_tied": "the residual is sequential",
    **dict.fromkeys(("rpe_num_buckets", "rpe_max_distance", "opt_pos_emb_offset"), "the position embedding is rotary"),
    "gmlp_attn_dim": "there are no gMLP layers",
    "attention_config": "every layer runs scaled_dot_product_attention, with flash attention where the device has it",
    "param_sharing_style": "layers do not share parameters",
    "use_cpu_initialization": "weights are always initialized on the CPU, identically for every layout",
    "num_workers": "each rank reads its samples itself, from memory-mapped files",
    "override_lr_scheduler": "the schedule always comes from the configuration, also when a run is continued",
    "peak_theoretical_tflops": "the log gives TFLOP/s; divide by the peak of one device (MI250X GCD: 191.5)",
    "steps_per_print": "log_interval sets how often a line is printed",
    "log_grad_norm": "the gradient norm is always logged",
    "mmap_warmup": "datasets are memory-mapped without pre-reading",
    "s3_chunk_size": "checkpoints are written to a file system only",
    **dict.fromkeys(("gradient_noise_scale_n_batches", "gradient_noise_scale_cpu_offload"), _NOT_LOGGED),
    **dict.fromkeys(("log_grad_pct_zeros", "log_optimizer_states", "log_gradient_noise_scale"), _NOT_LOGGED),
    **dict.fromkeys(("memory_profiling", "memory_profiling_path"), "memory profiles are not recorded"),
    **dict.fromkeys(("comms_logger", "flops_profiler", "dump_state"), "DeepSpeed's own reports are not printed"),
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "use_comet", "comet_workspace", "comet_project"), _WRITERS),
    **dict.fromkeys(("comet_experiment_name", "comet_tags", "comet_others", "comet_experiment"), _WRITERS),
    "wandb_init_all_ranks": "only rank 0 writes",
}

# Keys whose values of this type are GPT-NeoX's and have no effect; the others are this project's.
WITHOUT_EFFECT_OF_TYPE: dict[str, tuple[type, str]] = {"recompute": (bool, "generate.py decides this itself")}

_NOT_FOR_BF16 = "bf16 needs no loss scaling"
_OTHER_ZERO = "it concerns memory movement at other ZeRO stages, not the results"

# Keys inside mappings that are accepted like those above, as dotted names.
NESTED_WITHOUT_EFFECT: dict[str, dict[str, str]] = {
    "fp16": dict.fromkeys(("fp16", "type"), "`enabled` turns it on"),
    "bf16": {
        **dict.fromkeys(("bf16", "type"), "`enabled` turns it on"),
        **dict.fromkeys(("loss_scale", "loss_scale_window", "initial_scale_power"), _NOT_FOR_BF16),
        **dict.fromkeys(("hysteresis", "min_loss_scale"), _NOT_FOR_BF16),
    },
    "optimizer.params": {"max_grad_norm": "gradient_clipping bounds the norm"},
    "zero_optimization": {
        "overlap_comm": "the pipeline engine turns overlapping off",
        "load_from_fp32_weights": "fp32 masters are always restored",
        **dict.fromkeys(("round_robin_gradients", "ignore_unused_parameters", "elastic_checkpoint"), _OTHER_ZERO),
        **dict.fromkeys(("legacy_stage1", "sub_group_size", "use_multi_rank_bucket_allreduce"), _OTHER_ZERO),
        **dict.fromkeys(("stage3_max_live_parameters", "stage3_max_reuse_distance"), _OTHER_ZERO),
        **dict.fromkeys(("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), _OTHER_ZERO),
        "stage3_gather_16bit_weights_on_model_save": _OTHER_ZERO,
    },
}


def is_off(value: Any) -> bool:
    """Whether a key without effect is at a neutral value: not given, false, zero, empty, or a mapping that is not
    enabled."""
    return not value.get("enabled", bool(value)) if isinstance(value, dict) else not value
