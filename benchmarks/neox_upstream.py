"""Runs inside an environment of GPT-NeoX and parses configuration files there. Called by `neox_compat.py`.

Reads JSON from standard input, `[{"files": [...], "overrides": {...}}, ...]`, with GPT-NeoX's checkout in PYTHONPATH;
writes one JSON object per request: `{"error": ...}` or `{"values": {...}}`. The width of the MLP is that of the module
built by GPT-NeoX.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import logging
import os
import sys
from typing import Any

FLASH = "2.5.6"  # its configuration queries the version of flash-attn, which exists for GPUs only
VALUES = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_kv_heads", "max_position_embeddings", "seq_length"),
    *("rms_norm_epsilon", "rotary_emb_base", "no_weight_tying", "model_parallel_size", "make_vocab_size_divisible_by"),
    *("precision", "train_iters", "lr_decay_iters", "lr_decay_style", "warmup", "min_lr", "lr", "weight_decay"),
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("tokenizer_type", "vocab_file", "data_path", "train_data_paths", "split", "pack_impl", "seed"),
    *(
        "save",
        "load",
        "finetune",
        "checkpoint_factor",
        "eval_interval",
        "eval_iters",
        "log_interval",
        "tensorboard_dir",
    ),
)


def mlp_width(args: Any) -> Any:
    """Columns of the second matrix of GPT-NeoX's MLP, or a sentence if they do not match the first matrix."""
    from megatron.model import transformer

    asked: list[tuple[int, int]] = []

    class Linear:
        def __init__(self, input_size: int, output_size: int, **_: Any) -> None:
            asked.append((input_size, output_size))

    transformer.get_parallel_linear = lambda _: (Linear, Linear)
    mlp = object.__new__(transformer.ParallelMLP)
    mlp.__setattr__ = object.__setattr__
    transformer.nn.Module.__init__(mlp)
    transformer.ParallelMLP.__init__(mlp, args, None, None, multiple_of=args.mlp_multiple_of)
    (_, rows), (columns, _) = asked
    return columns if rows == 2 * columns else f"{rows} rows against {columns} columns"


def values_of(files: list[str], overrides: dict[str, Any]) -> dict[str, Any]:
    from megatron.neox_arguments import NeoXArgs

    args = NeoXArgs.from_ymls(files, overwrite_values=overrides)
    values = {name: getattr(args, name) for name in VALUES}
    values["num_kv_heads"] = args.num_kv_heads or args.num_attention_heads
    values["betas"] = (args.optimizer or {}).get("params", {}).get("betas")
    values["gated"] = args.activation == "swiglu"
    values["mlp_width"] = mlp_width(args) if values["gated"] else None
    return values


def main() -> None:
    out = os.dup(1)  # it redirects standard output to its log files
    real = importlib.metadata.version
    importlib.metadata.version = lambda name: FLASH if name == "flash-attn" else real(name)
    logging.disable(logging.CRITICAL)
    with contextlib.redirect_stdout(io.StringIO()):
        from megatron import neox_arguments  # noqa: F401 an environment that cannot import it ends here
    answers: list[dict[str, Any]] = []
    for request in json.load(sys.stdin):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                answers.append({"values": values_of(request["files"], request["overrides"])})
        except Exception as error:  # any exception is its verdict
            answers.append({"error": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"})
    os.write(out, json.dumps(answers).encode())


if __name__ == "__main__":
    main()
