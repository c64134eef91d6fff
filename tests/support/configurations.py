"""Keys of a small valid training run, for tests of the configuration and of the data."""

from __future__ import annotations

from typing import Any

from examples.llama_keys import LLAMA
from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.registry import Task

ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}

VALID: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_kv_heads": 4,
    "intermediate_size": 352,
    **LLAMA,
    "vocab_size": 4096,
    "make_vocab_size_divisible_by": 1,
    "no_weight_tying": True,
    "max_position_embeddings": 1024,
    "rms_norm_epsilon": 1e-5,
    "rotary_emb_base": 500000,
    "rope_scaling": ROPE,
    "seq_length": 256,
    "train_iters": 10,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8}},
    "train_data_paths": ["data/a_text_document"],
    "from_scratch": True,
    "distributed_backend": "gloo",
}


def keys(**changes: Any) -> dict[str, Any]:
    """The valid keys with changes; None removes a key."""
    return {name: value for name, value in {**VALID, **changes}.items() if value is not None}


# Changes that turn the valid keys into those of a run on images.
IMAGES: dict[str, Any] = {
    "vocab_size": None,
    "make_vocab_size_divisible_by": None,
    "no_weight_tying": None,
    "modality": "patches",
    "patches": {"size": 8, "normalise": "patch"},
}


def data_args(task: Task = "train", **changes: Any) -> NeoXArgs:
    """The configuration of a run that reads data: 20 steps of 8 samples of 16 tokens, without a vocabulary limit.

    `changes` name the data. The checkpoint that an evaluation names is never read.
    """
    base = {
        "seq_length": 16,
        "train_iters": 20,
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": None,
        "gradient_accumulation_steps": None,
        "vocab_size": 1 << 20,
        "split": "8,1,1",
        "train_data_paths": None,
    }
    start = {} if task == "train" else {"from_scratch": None, "load": "nowhere"}
    return NeoXArgs.from_dict(keys(**base | start | changes), task=task)
