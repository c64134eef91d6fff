"""Comparison with mergekit: bits of linear, task_arithmetic and DARE with the same masks; TIES and slerp by value.

mergekit's results are committed (written by tests/support/mergekit_golden.py). If mergekit is available in this
interpreter, or in the one named by NEOX_MERGEKIT, they are recomputed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support.merge_sets import SETS, compared_by_value, model_name, parent_state, recipes, write_set
from tests.support.mergekit_golden import (
    DIGESTS,
    SEED,
    STATISTICS,
    VALUES,
    big_deltas,
    flat,
    merged_statistics,
    tensor_digest,
)
from tests.support.merges import merged_state
from tests.support.requirements import need
from tools.merge import job as merge_job
from tools.merge.masks import keep_mask, mask_key, threshold

pytestmark = pytest.mark.unit

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).resolve().parents[2]


def merged(root: Path, name: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every recipe of a set, merged in small tiles."""
    write_set(root, name)
    for recipe, body in recipes(root, name).items():
        yield recipe, merged_state(body | {"random_seed": SEED})


@pytest.mark.parametrize("name", SETS)
def test_results_of_mergekit(name: str, tmp_path: Path) -> None:
    digests = json.loads((GOLDEN / DIGESTS).read_text())[name]
    values = load_file(GOLDEN / VALUES)
    compared = 0
    for recipe, state in merged(tmp_path, name):
        if not compared_by_value(recipe):
            assert {n: tensor_digest(t) for n, t in state.items()} == digests[recipe], recipe
            compared += 1
            continue
        ours, theirs = flat(state), values[f"{name}/{recipe}"]
        different = ours.view(torch.int16) != theirs.view(torch.int16)
        if recipe == "slerp":
            steps = (ours.view(torch.int16).int() - theirs.view(torch.int16).int()).abs()
            assert int(steps.max()) <= 1
            assert int(different.sum()) <= 3
        else:
            density = float(recipe.split()[1].rstrip(","))
            allowed = torch.cat([on_the_threshold(name, n, density).flatten() for n in sorted(state)])
            assert not bool((different & ~allowed).any()), recipe
    assert compared == len(digests) == 11


def on_the_threshold(name: str, tensor: str, density: float) -> Tensor:
    """Elements with ties in some model: their magnitude is the smallest one kept, and only some elements of that
    magnitude are kept."""
    base = parent_state(name, 0)[tensor].float()
    result = torch.zeros(base.shape, dtype=torch.bool)
    for number in range(1, SETS[name][1] + 1):
        size = (parent_state(name, number)[tensor].float() - base).abs()
        ordered = size.flatten().sort(descending=True).values
        k = max(1, int(density * size.numel()))
        if k < len(ordered) and ordered[k] == ordered[k - 1]:
            result |= size == ordered[k - 1]
    return result


def test_another_processor_gives_the_same_bits(tmp_path: Path) -> None:
    """Without vector instructions, and thus without fused multiply-adds, which torch's kernels use if available."""
    write_set(tmp_path, "mha")
    (tmp_path / "recipes.json").write_text(json.dumps(recipes(tmp_path, "mha")))
    command = [sys.executable, "-m", "tests.support.merges", str(tmp_path / "recipes.json"), str(SEED)]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    for recipe, digests in json.loads((GOLDEN / DIGESTS).read_text())["mha"].items():
        assert results[recipe] == digests, recipe
    here = {
        recipe: {n: tensor_digest(t) for n, t in state.items()} for recipe, state in merged(tmp_path / "here", "mha")
    }
    assert here == results


def test_a_wrong_mask_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: masks with another seed, and sums in another order, give different bits."""
    digests = json.loads((GOLDEN / DIGESTS).read_text())["six-models"]
    key = merge_job.mask_key
    monkeypatch.setattr(merge_job, "mask_key", lambda seed, *rest: key(seed + 1, *rest))
    results = {
        recipe: {n: tensor_digest(t) for n, t in state.items()} for recipe, state in merged(tmp_path, "six-models")
    }
    for recipe in ("dare_ties 0.5", "dare_linear 0.53"):
        assert results[recipe] != digests[recipe]
    assert results["dare_ties 1"] == digests["dare_ties 1"]  # nothing is drawn


def test_random_masks_agree_in_distribution() -> None:
    """mergekit's own generator and rescaling on 131,072 elements: the merged delta has the same shape."""
    theirs = json.loads((GOLDEN / STATISTICS).read_text())
    weights, deltas, limit = (0.7, 0.15, 0.075, 0.075), big_deltas(), threshold(0.5)
    parts = []
    for i, (delta, weight) in enumerate(zip(deltas, weights, strict=True)):
        mask = keep_mask(mask_key(SEED, "t", model_name(i)), 0, delta.numel(), limit).reshape(delta.shape)
        parts.append(delta * torch.from_numpy(mask) * 2 * weight)
    ours = merged_statistics(parts, [d * w for d, w in zip(deltas, weights, strict=True)])
    count = deltas[0].numel()
    standard_error = ours["std"] / count**0.5
    assert abs(ours["mean"] - theirs["mean"]) < 5 * standard_error
    assert abs(ours["std"] / theirs["std"] - 1) < 0.01
    assert abs(ours["zeros"] - theirs["zeros"]) < 5 * (0.0625 * 0.9375 * 2 / count) ** 0.5
    assert abs(ours["projection"] - theirs["projection"]) < 0.02
    assert abs(ours["zeros"] - 0.5**4) < 5 * (0.0625 * 0.9375 / count) ** 0.5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_committed_results_equal_those_of_mergekit(tmp_path: Path) -> None:
    here = importlib.util.find_spec("mergekit") is not None
    python = sys.executable if here else os.environ.get("NEOX_MERGEKIT", "")
    need("mergekit", bool(python), "pip install mergekit, or name an interpreter that has it in NEOX_MERGEKIT")
    command = [python, "-m", "tests.support.mergekit_golden", "--output", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert json.loads((tmp_path / DIGESTS).read_text()) == json.loads((GOLDEN / DIGESTS).read_text())
    again, before = load_file(tmp_path / VALUES), load_file(GOLDEN / VALUES)
    assert again.keys() == before.keys()
    for name, value in again.items():
        assert np.array_equal(value.view(torch.int16).numpy(), before[name].view(torch.int16).numpy()), name
