"""Records mergekit's results for the sets of merge_sets.py, with this project's masks in place of its own.

    PYTHON_WITH_MERGEKIT -m tests.support.mergekit_golden --output tests/merge/golden

mergekit is LGPL and none of its code is here: it runs unchanged except for `sparsify`, which draws random masks. Its
version 0.1.5 with torch 2.13 wrote the committed files. Results that must be bit-equal are stored as the beginning of
each tensor's SHA-256; those compared by value are stored in full, all tensors of a result in one vector.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.hf_folders import read_hf
from tests.support.merge_sets import SETS, compared_by_value, model_name, noise, recipes, write_set

SEED = 7
DIGESTS, VALUES, STATISTICS = "digests.json", "values.safetensors", "statistics.json"
BIG = (256, 512)  # large enough for statistics


def tensor_digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def flat(state: dict[str, Tensor]) -> Tensor:
    """All tensors concatenated, in order of their names."""
    return torch.cat([state[name].flatten() for name in sorted(state)])


def reference_mask(tensor: str, label: str, count: int, density: float) -> Tensor:
    """A second implementation of the mask scheme."""
    key = np.frombuffer(hashlib.sha256(f"{SEED}\0{tensor}\0{label}".encode()).digest()[:16], "<u8")
    raw = np.random.Philox(key=key).random_raw(-(-count // 4)).astype("<u8", copy=False)
    return torch.from_numpy(raw.view("<u2")[:count] < round(density * 65536))


def inject_masks() -> None:
    """Make mergekit draw our masks and rescale by 1/p."""
    import mergekit.merge_methods.generalized_task_arithmetic as module

    kind = module.GeneralizedTaskArithmeticMerge
    merge_group, sparsify = kind.merge_group, module.sparsify
    now: dict[str, Any] = {}

    def noted(self: Any, group: Any, /, **parameters: Any) -> Tensor:
        labels = [Path(str(entry.id.model.path)).name for entry in group.non_base]
        now.update(name=group.metadata.name, labels=iter(labels))
        return merge_group(self, group, **parameters)

    def sparse(delta: Tensor, density: float, method: Any, **rest: Any) -> Tensor:
        label = next(now["labels"])
        if str(getattr(method, "value", method)) != "random":
            return sparsify(delta, density=density, method=method, **rest)
        if density >= 1:
            return delta
        kept = delta * reference_mask(now["name"], label, delta.numel(), density).reshape(delta.shape)
        return kept * (65536 / round(density * 65536))

    kind.merge_group, module.sparsify = noted, sparse


def merged_by_mergekit(recipe: dict[str, Any], output: Path, seed: int | None = None) -> dict[str, Tensor]:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(quiet=True, copy_tokenizer=False, random_seed=seed)
    run_merge(MergeConfiguration.model_validate(recipe), str(output), options)
    return read_hf(output)


def big_deltas() -> list[Tensor]:
    """Deltas of four models of one large tensor."""
    return [torch.from_numpy(0.002 * noise(f"big {i}", BIG)).float() for i in range(4)]


def random_statistics() -> dict[str, float]:
    """mergekit's own random masks and l1 rescaling on a large tensor, at density 0.5."""
    from mergekit.sparsify import RescaleNorm, SparsificationMethod, sparsify

    torch.manual_seed(SEED)
    weights = (0.7, 0.15, 0.075, 0.075)
    deltas = big_deltas()
    parts = [
        sparsify(d, density=0.5, method=SparsificationMethod.random, rescale_norm=RescaleNorm.l1) * w
        for d, w in zip(deltas, weights, strict=True)
    ]
    return merged_statistics(parts, [d * w for d, w in zip(deltas, weights, strict=True)])


def merged_statistics(parts: list[Tensor], whole: list[Tensor]) -> dict[str, float]:
    """Mean, spread, share of zeros and projection on the linear merge of sparse, weighted deltas after the election."""
    stack = torch.stack(parts).double()
    elected = torch.where(stack.sum(0) >= 0, stack.clamp(min=0).sum(0), stack.clamp(max=0).sum(0))
    linear = torch.stack(whole).double().sum(0)
    return {
        "mean": float(elected.mean()),
        "std": float(elected.std()),
        "zeros": float((elected == 0).double().mean()),
        "projection": float((elected * linear).sum() / (linear * linear).sum()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # mergekit's sums depend on the number of threads
    statistics = random_statistics()
    inject_masks()
    digests: dict[str, dict[str, dict[str, str]]] = {}
    values: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as work:
        for name in SETS:
            root = Path(work) / name
            write_set(root, name)
            digests[name] = {}
            for number, (recipe, body) in enumerate(recipes(root, name).items()):
                state = merged_by_mergekit(body, root / f"out{number}")
                if compared_by_value(recipe):
                    values[f"{name}/{recipe}"] = flat(state)
                else:
                    digests[name][recipe] = {tensor: tensor_digest(value) for tensor, value in sorted(state.items())}
            print(f"{name}: {len(digests[name])} results, {model_name(SETS[name][1])} is the last model", flush=True)
    (options.output / DIGESTS).write_text(json.dumps(digests, indent=0) + "\n")
    (options.output / STATISTICS).write_text(json.dumps(statistics, indent=1) + "\n")
    save_file(values, options.output / VALUES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
