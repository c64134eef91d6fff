"""Runs inside an environment of GPT-NeoX: its training on the CPU, with a replacement for CUDA.

    python neox_upstream_train.py CONFIG.json

Called by `neox_continue.py`, once per rank, with GPT-NeoX's checkout in PYTHONPATH and `DS_ACCELERATOR=cpu`. Only
devices are replaced, and the fused Adam by torch's AdamW, which makes the same steps.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class OnCpu(TorchFunctionMode):
    """Creates tensors requested on CUDA on the CPU instead; `.cuda()` returns the tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return args[0] if func is torch.Tensor.cuda else func(*args, **kwargs)


def stand_in_for_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: int(os.environ["WORLD_SIZE"])
    cuda.current_device = lambda: torch.device("cpu")
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, lambda *_, **__: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *_, **__: 0)
    cuda.LongTensor, cuda.manual_seed, cuda.get_rng_state = torch.LongTensor, torch.manual_seed, torch.get_rng_state
    cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    OnCpu().__enter__()


def stand_in_for_fused_adam() -> None:
    import deepspeed.ops.adam
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    class Adam(torch.optim.AdamW):
        def __init__(self, params: Any, lr: float, betas: Any, eps: float, weight_decay: float = 0.0, **_: Any) -> None:
            super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    deepspeed.ops.adam.FusedAdam = Adam
    ZERO_SUPPORTED_OPTIMIZERS.append(Adam)
    CPU_Accelerator.is_fp16_supported = lambda self: True  # torch computes it, slowly


def main() -> None:
    stand_in_for_cuda()
    stand_in_for_fused_adam()
    from megatron import training
    from megatron.neox_arguments import NeoXArgs

    # Its final evaluation does not use the pipeline.
    training.evaluate_and_print_results = lambda *_, **__: None
    with open(sys.argv[1]) as file:
        args = NeoXArgs.from_dict(json.load(file))
    args.configure_distributed_args()
    args.build_tokenizer()
    args.initialize_tensorboard_writer()
    training.pretrain(neox_args=args)


if __name__ == "__main__":
    main()
