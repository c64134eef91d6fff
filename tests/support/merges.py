"""Running merges in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from tests.support.hf_folders import Model, write_hf
from tests.support.merge_sets import SETS, recipes, write_set
from tests.support.mergekit_golden import tensor_digest
from tools.convert_hf.stream.plan import CopyJob
from tools.merge.cli import main
from tools.merge.job import MergeJob, MergeRequest
from tools.merge.recipe_file import parse_recipe


def write_recipe(path: Path, body: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return path


def run_merge(recipe: Path, *words: Any, expect: int = 0) -> None:
    """Run the merge command; `words` begin with --output or --verify."""
    assert main([str(recipe), *map(str, words), "--quiet"]) == expect


def merge_to(recipe: Path, output: Path, *words: Any) -> Path:
    run_merge(recipe, "--output", output, *words)
    return output


def prepared(root: Path, name: str, recipe: str, **changes: Any) -> Path:
    """Write the models of a set to `root`, and one of its recipes with changed top-level keys to a file."""
    if not (root / "base").exists():
        write_set(root, name)
    assert name in SETS
    return write_recipe(root / "merge.yml", recipes(root, name)[recipe] | {"random_seed": 7} | changes)


def merged_state(body: dict[str, Any], threads: int = 1, tile: int = 64) -> dict[str, Tensor]:
    """The merged tensors, computed like the command but without an output folder."""
    job = MergeJob(parse_recipe(body, "recipe"), MergeRequest(Path("unwritten"), threads=threads, tile=tile))
    source = job.bands(sorted(job.merged.tensors), lambda units: None)
    state = {}
    for name, tensor in job.merged.tensors.items():
        band = memoryview(bytearray(tensor.nbytes))
        source.read(CopyJob(tensor, 0, tensor.shape[0]), band)
        state[name] = torch.frombuffer(band, dtype=getattr(torch, tensor.dtype.name)).view(tensor.shape)
    source.close()
    return state


PARENTS_MODEL = Model()


def write_parents(root: Path) -> None:
    """Write folders base, a and b, and an adapter of base."""
    for seed, name in enumerate(("base", "a", "b")):
        write_hf(root / name, PARENTS_MODEL, PARENTS_MODEL.state(seed), shards=1 + seed % 2)
    adapter = root / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base"})
    )
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{prefix}.lora_A.weight": torch.ones(2, 32), f"{prefix}.lora_B.weight": torch.ones(32, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")


def good_recipe(root: Path) -> dict[str, Any]:
    """A valid merge of the models from `write_parents`."""
    return {
        "merge_method": "dare_ties",
        "base_model": str(root / "base"),
        "models": [
            {"model": str(root / "a"), "parameters": {"weight": 0.7, "density": 0.5}},
            {"model": str(root / "b"), "parameters": {"weight": 0.3, "density": [0.2, 0.9]}},
        ],
        "parameters": {"normalize": False},
        "random_seed": 1,
    }


def main_digests(recipes_file: Path, seed: int) -> dict[str, dict[str, str]]:
    """Digests of every recipe in a JSON file; runs in a separate process."""
    bodies = json.loads(recipes_file.read_text())
    return {
        name: {n: tensor_digest(t) for n, t in merged_state(body | {"random_seed": seed}).items()}
        for name, body in bodies.items()
    }


if __name__ == "__main__":
    print(json.dumps(main_digests(Path(sys.argv[1]), int(sys.argv[2]))))
