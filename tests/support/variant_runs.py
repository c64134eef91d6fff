"""Trains several variants of a small model one after the other in the same forked ranks, on the same samples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron.engine.protocol import Engine
from tests.support.engine_runs import build, make_samples, rank_parameters, relative_difference, step, whole_model
from tests.support.models import LLAMA3_ROPE, Case
from tests.support.ranks import run_ranks

GLOBAL_BATCH, STEPS = 8, 3
UNTIED = Case(heads=8, kv_heads=4, head_dim=8, layers=4, intermediate=88, vocab=160, rope=LLAMA3_ROPE, seq=24)
TIED = Case(heads=8, kv_heads=4, head_dim=8, layers=4, intermediate=88, vocab=160, tied=True, seq=24)

Split = tuple[int, int, int]
"""TP, PP, DP"""

Keys = tuple[tuple[str, Any], ...]
"""Further keys of the configuration and their values."""


@dataclass(frozen=True)
class Variant:
    """The settings of a training that do not depend on the layout."""

    case: Case = UNTIED
    documents: bool = False
    recompute: bool = False
    precision: str = "fp32"

    def __str__(self) -> str:
        words = ("tied", self.case.tied), ("documents", self.documents), ("recomputed", self.recompute)
        return " ".join([self.precision, *(word for word, is_so in words if is_so)])

    def arguments(self, split: Split, sequence_parallel: bool, **keys: Any) -> Any:
        """The configuration; Adam's eps is 1e-5, as with 1e-8 a gradient of pure rounding error causes a full step."""
        tp, pp, dp = split
        micro = keys.get("train_micro_batch_size_per_gpu", 2)
        defaults: dict[str, Any] = {
            "model_parallel_size": tp,
            "pipe_parallel_size": pp,
            "sequence_parallel": sequence_parallel,
            "isolate_documents": self.documents,
            "recompute": "full" if self.recompute else "none",
            "precision": self.precision,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": GLOBAL_BATCH // (micro * dp),
            "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-5}},
            "gradient_clipping": 0.5,  # below the observed norms, so that clipping takes effect
            "world_size": tp * pp * dp,
        }
        return self.case.neox(**defaults | keys)

    def samples(self) -> list[dict[str, Tensor]]:
        """The samples of all steps; with documents, each sample holds two or three."""
        samples = make_samples(self.case, GLOBAL_BATCH * STEPS)
        if self.documents:
            for number, sample in enumerate(samples):
                positions = torch.arange(self.case.seq)
                for start in {3 + number % 7, 11 + number % 13}:
                    positions[start:] = torch.arange(self.case.seq - start)
                sample["positions"] = positions
        return samples


@dataclass
class Training:
    """(loss, gradient norm) of every step, the whole model after the last one, and the engine's description."""

    history: list[tuple[float, float]]
    model: dict[str, Tensor]
    description: list[str]


def train_variant(
    variant: Variant, split: Split, sequence_parallel: bool, keys: Keys = ()
) -> tuple[Engine, list[tuple[float, float]]]:
    """Train on this rank in new groups; returns the engine after the last step, and (loss, norm) of every step."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    args = variant.arguments(split, sequence_parallel, **dict(keys))
    engine = build(args, variant.case)
    samples = variant.samples()
    history = []
    for iteration in range(STEPS):
        batch = samples[iteration * GLOBAL_BATCH : (iteration + 1) * GLOBAL_BATCH]
        history.append(step(engine, args, batch, iteration))
    return engine, history


def _train(
    rank: int, world_size: int, variants: tuple[Variant, ...], split: Split, sequence_parallel: bool, keys: Keys
) -> Any:
    found = []
    for variant in variants:
        engine, history = train_variant(variant, split, sequence_parallel, keys)
        found.append((history, rank_parameters(engine), engine.describe()))
    return found


@cache
def trained(
    variants: tuple[Variant, ...], split: Split, sequence_parallel: bool = False, keys: Keys = ()
) -> list[Training]:
    """Train every variant in one layout with further `keys`, in one fork; asserts that replicas are bit-equal."""
    tp, pp, dp = split
    ranks = run_ranks(_train, tp * pp * dp, variants, split, sequence_parallel, keys, timeout=300)
    trainings = []
    for variant, results in zip(variants, zip(*ranks, strict=True), strict=True):
        history, _, description = results[0]
        assert all(other == history for other, _, _ in results), "ranks disagree about the loss"
        model = whole_model([parameters for _, parameters, _ in results], variant.arguments(split, sequence_parallel))
        trainings.append(Training(history, model, description))
    return trainings


def differences(found: Training, expected: Training) -> tuple[float, float, float]:
    """Largest relative differences of a loss, a gradient norm, and a parameter (||a - b|| / ||b||)."""
    pairs = list(zip(found.history, expected.history, strict=True))
    assert found.model.keys() == expected.model.keys()
    return (
        max(abs(a[0] - b[0]) / abs(b[0]) for a, b in pairs),
        max(abs(a[1] - b[1]) / abs(b[1]) for a, b in pairs),
        max(relative_difference(tensor, expected.model[name]) for name, tensor in found.model.items()),
    )
