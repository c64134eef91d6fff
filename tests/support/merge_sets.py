"""Random sets of parents for merges, the same on every machine, and recipes to apply to each.

Values come from NumPy's raw Philox words and exact arithmetic, so they do not depend on a version of NumPy or torch;
mergekit's results for these sets are in tests/merge/golden (see mergekit_golden.py).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support.hf_folders import Model, write_hf

_BF16, _FP32 = torch.bfloat16, torch.float32
# name -> (sizes, number of models besides the base)
SETS: dict[str, tuple[Model, int]] = {
    "gqa": (Model(layers=2, heads=4, kv_heads=2, head_dim=4, intermediate=20, vocab=24), 4),
    "gqa-tied": (Model(layers=2, heads=4, kv_heads=2, head_dim=4, intermediate=20, vocab=24, tied=True), 4),
    "gqa-fp32": (Model(layers=2, heads=4, kv_heads=2, head_dim=4, intermediate=20, vocab=24, dtype=_FP32), 3),
    "mha": (Model(layers=2, heads=4, kv_heads=4, head_dim=4, intermediate=12, vocab=30), 3),
    "mha-tied": (Model(layers=3, heads=2, kv_heads=2, head_dim=8, intermediate=9, vocab=33, tied=True), 2),
    "mha-fp32": (Model(layers=2, heads=2, kv_heads=2, head_dim=4, intermediate=31, vocab=17, dtype=_FP32), 4),
    "mqa": (Model(layers=2, heads=4, kv_heads=1, head_dim=4, intermediate=20, vocab=24), 2),
    "mqa-tied-fp32": (
        Model(layers=2, heads=4, kv_heads=1, head_dim=4, intermediate=20, vocab=24, tied=True, dtype=_FP32),
        4,
    ),
    "one-layer": (Model(layers=1, heads=4, kv_heads=2, head_dim=6, intermediate=40, vocab=50), 4),
    "deep": (Model(layers=5, heads=2, kv_heads=1, head_dim=4, intermediate=11, vocab=19), 3),
    "wide": (Model(layers=1, heads=8, kv_heads=2, head_dim=6, intermediate=64, vocab=40), 2),
    "six-models": (Model(layers=2, heads=2, kv_heads=1, head_dim=6, intermediate=16, vocab=21), 6),
}
WEIGHTS = (0.7, 0.15, 0.075, 0.075, 0.3, -0.2)
_BY_NAME = [{"filter": "mlp", "value": [0.2, 0.9]}, {"filter": "q_proj", "value": 0.31}, {"value": [0.6, 0.1, 0.4]}]


def model_name(number: int) -> str:
    """The label of a model; labels sort like the numbers."""
    return f"m{number}"


def noise(seed: str, shape: tuple[int, ...]) -> np.ndarray:
    """Bell-shaped random numbers between -2 and 2: sums of four uniform ones, exact in float64."""
    key = np.frombuffer(hashlib.sha256(seed.encode()).digest()[:16], "<u8")
    count = int(np.prod(shape))
    words = np.random.Philox(key=key).random_raw(count).astype("<u8", copy=False).view("<u2").reshape(count, 4)
    return ((words.astype(np.float64).sum(axis=1) - 2 * 65535) / 65536).reshape(shape)


def parent_state(name: str, number: int) -> dict[str, Tensor]:
    """Weights of the base (number 0) or of a model of a set."""
    model = SETS[name][0]
    state = {}
    for tensor, like in model.state().items():
        shape = tuple(like.shape)
        values = 0.05 * noise(f"{name} {tensor}", shape) + ("norm" in tensor)
        if number:
            values = values + 0.004 * noise(f"{name} {number} {tensor}", shape)
        state[tensor] = torch.from_numpy(values).to(model.dtype)
    return state


def write_set(root: Path, name: str) -> None:
    """Write `root/base` and `root/m1`, `root/m2`, ...; every other model has two shards."""
    model, count = SETS[name]
    for number in range(count + 1):
        folder = root / (model_name(number) if number else "base")
        write_hf(folder, model, parent_state(name, number), shards=1 + number % 2)


def recipes(root: Path, name: str) -> dict[str, dict[str, Any]]:
    """mergekit recipes by a descriptive name, with arithmetic in fp32 and output in bf16."""
    models = [str(root / model_name(i + 1)) for i in range(SETS[name][1])]
    types = {"dtype": "float32", "out_dtype": "bfloat16"}

    def merge(method: str, whole: dict[str, Any] | None = None, **parameters: Any) -> dict[str, Any]:
        entries = []
        for i, model in enumerate(models):
            own = {"weight": WEIGHTS[i]} | {k: v(i) if callable(v) else v for k, v in parameters.items()}
            entries.append({"model": model, "parameters": own})
        body: dict[str, Any] = {"merge_method": method, "models": entries, "parameters": whole or {}} | types
        return body if method == "linear" else body | {"base_model": str(root / "base")}

    result = {
        "linear": merge("linear"),
        "linear, not normalized": merge("linear", {"normalize": False}, weight=_BY_NAME),
        "task_arithmetic": merge("task_arithmetic"),
        "task_arithmetic, normalized": merge("task_arithmetic", {"normalize": True, "lambda": 0.8}, weight=_BY_NAME),
        "dare_linear 0.53": merge("dare_linear", density=0.53),
        "dare_linear, normalized": merge("dare_linear", {"normalize": True}, density=[0.2, 0.9]),
        "dare_ties 1": merge("dare_ties", density=1.0),
        "dare_ties 0.53": merge("dare_ties", density=0.53),
        "dare_ties 0.5": merge("dare_ties", density=0.5),
        "dare_ties 0.1": merge("dare_ties", density=0.1),
        "dare_ties, mixed": merge(
            "dare_ties",
            {"normalize": True, "lambda": [0.5, 1.25]},
            density=lambda i: [{"filter": "self_attn", "value": 0.9 - 0.1 * i}, {"value": 0.4}],
            weight=_BY_NAME,
        ),
        "ties 0.5": merge("ties", density=0.5),
        "ties 0.2, not normalized": merge("ties", {"normalize": False, "lambda": 1.5}, density=0.2),
        "slerp": {
            "merge_method": "slerp",
            "base_model": str(root / "base"),
            "models": [{"model": str(root / "base")}, {"model": models[0]}],
            "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5, 0.3, 1]}, {"value": 0.4}]},
        }
        | types,
    }
    return result


def compared_by_value(recipe: str) -> bool:
    """Whether bit equality cannot be expected: equal magnitudes (ties), another order of summation (slerp)."""
    return recipe.startswith(("ties", "slerp"))
