"""Other implementations that benchmarks/kernels.py measures next to ours, as far as they are installed.

apex is used only if it has `apex.optimizers`: the package of that name on PyPI is unrelated.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EPS = 1e-5
Function = Callable[..., Tensor | tuple[Tensor, ...]]


def found(module: str, *names: str) -> Any:
    """The imported module, or None if it or one of its `names` is missing."""
    try:
        there = importlib.import_module(module)
    except (ImportError, OSError, RuntimeError):  # built for another torch, or without its driver
        return None
    return there if all(hasattr(there, name) for name in names) else None


def apex(module: str, *names: str) -> Any:
    return found(module, *names) if found("apex.optimizers", "FusedAdam") else None


def norms(hidden: int, weight: Tensor) -> dict[str, Function]:
    peers: dict[str, Function] = {}
    if liger := found("liger_kernel.ops.rms_norm", "LigerRMSNormFunction"):
        peers["liger"] = lambda x, w: liger.LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)
    if fused := apex("apex.normalization.fused_layer_norm", "fused_rms_norm_affine"):
        peers["apex"] = lambda x, w: fused.fused_rms_norm_affine(x, w, (hidden,), EPS)
    if quack := found("quack", "rmsnorm"):
        peers["quack"] = lambda x, w: quack.rmsnorm(x, w, eps=EPS)
    if te := found("transformer_engine.pytorch", "RMSNorm"):
        module = te.RMSNorm(hidden, eps=EPS, params_dtype=weight.dtype, device=weight.device)
        module.weight = torch.nn.Parameter(weight.detach())
        peers["transformer engine"] = lambda x, w: torch.func.functional_call(module, {"weight": w}, (x,))
    return peers


def rotary(angles: Tensor) -> dict[str, Function]:
    """Rotary embeddings of q and k; `angles` [s, 1, 1, d] fp32."""
    rope = apex("apex.transformer.functional", "fused_apply_rotary_pos_emb")
    if rope is None:
        return {}
    turn = rope.fused_apply_rotary_pos_emb
    return {"apex": lambda q, k: (turn(q, angles), turn(k, angles))}


def swiglu() -> dict[str, Function]:
    liger = found("liger_kernel.ops.swiglu", "LigerSiLUMulFunction")
    if liger is None:
        return {}

    def of_liger(fused: Tensor) -> Tensor:
        up, gate = fused.chunk(2, -1)
        out: Tensor = liger.LigerSiLUMulFunction.apply(gate.contiguous(), up.contiguous())
        return out

    return {"liger": of_liger}


def cross_entropy() -> dict[str, Function]:
    peers: dict[str, Function] = {}
    if liger := found("liger_kernel.transformers.cross_entropy", "LigerCrossEntropyLoss"):
        loss = liger.LigerCrossEntropyLoss(reduction="none")
        peers["liger"] = lambda x, labels: loss(x.clone(), labels)  # it overwrites its input
    if quack := found("quack", "cross_entropy"):
        peers["quack"] = lambda x, labels: quack.cross_entropy(x, labels, reduction="none")
    return peers


def adam() -> dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]]:
    """Alternatives to torch's fused AdamW, which both engines use."""
    optimizers = apex("apex.optimizers", "FusedAdam")
    if optimizers is None:
        return {}
    return {"apex": lambda parameters: optimizers.FusedAdam(parameters, weight_decay=0.1, adam_w_mode=True)}
