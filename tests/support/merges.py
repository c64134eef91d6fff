"""Running merges in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from tests.support.merge_sets import SETS, recipes, write_set
from tools.convert_hf.stream.plan import CopyJob
from tools.merge.cli import main
from tools.merge.job import MergeJob, MergeRequest
from tools.merge.recipe_file import parse_recipe

LABELLED = ("README.md", "merge_report.json", "merge.yml")  # files that the command writes beside the weights


def write_recipe(path: Path, body: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return path


def run_merge(recipe: Path, *words: Any, expect: int = 0) -> None:
    """The command; `words` begin with --output or --verify."""
    assert main([str(recipe), *map(str, words), "--quiet"]) == expect


def merge_to(recipe: Path, output: Path, *words: Any) -> Path:
    run_merge(recipe, "--output", output, *words)
    return output


def prepared(root: Path, name: str, recipe: str, **changes: Any) -> Path:
    """The models of a set in `root`, and a recipe of it with its top-level keys changed, as a file."""
    if not (root / "base").exists():
        write_set(root, name)
    assert name in SETS
    return write_recipe(root / "merge.yml", recipes(root, name)[recipe] | {"random_seed": 7} | changes)


def merged_state(body: dict[str, Any], threads: int = 1, tile: int = 64) -> dict[str, Tensor]:
    """The merged tensors, computed as the command does it, without a folder."""
    job = MergeJob(parse_recipe(body, "recipe"), MergeRequest(Path("unwritten"), threads=threads, tile=tile))
    source = job.bands(sorted(job.merged.tensors), lambda units: None)
    state = {}
    for name, tensor in job.merged.tensors.items():
        band = memoryview(bytearray(tensor.nbytes))
        source.read(CopyJob(tensor, 0, tensor.shape[0]), band)
        state[name] = torch.frombuffer(band, dtype=getattr(torch, tensor.dtype.name)).view(tensor.shape)
    source.close()
    return state
