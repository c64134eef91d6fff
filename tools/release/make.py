"""Make a release: weights, model card, licenses and provenance, in a folder that appears only when complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron.checkpoint.discovery import find_checkpoint
from megatron.checkpoint.manifest import read_manifest
from megatron.checkpoint.provenance import commit, versions
from megatron.common.quantity import quantity
from tools.convert_hf.cli import main as convert
from tools.release.card import model_card
from tools.release.hashes import PROVENANCE, folder_facts, sealed
from tools.release.recipe import ReleaseError, ReleaseRecipe, read_recipe
from tools.release.stages import data_facts, prefixes_of, stage_facts

FORMAT, VERSION = "neox-llama-release", 1
CARD = "README.md"


def make_release(recipe_path: Path, output: Path) -> Iterator[str]:
    """Write a release and yield lines that report it. ReleaseError, and no folder, if anything needed is missing."""
    recipe = read_recipe(recipe_path)
    if output.exists():
        raise ReleaseError(f"{output} exists; a release is written once: give another folder, or remove it")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _export(recipe, partial)
        provenance = _provenance(recipe, partial / "tokenizer.json")
        (partial / CARD).write_text(model_card(recipe, provenance), encoding="utf-8")
        content = {"format": FORMAT, "version": VERSION, **provenance, "files": folder_facts(partial)}
        (partial / PROVENANCE).write_text(sealed(content), encoding="utf-8")
        os.rename(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    files = content["files"].values()
    yield f"{output}: {quantity(len(files), 'file')}, {sum(one['bytes'] for one in files):,} bytes"
    for stage in provenance["stages"]:
        yield f"stage {stage['name']}: {len(stage['steps'])} of {stage['train_iters']} steps recorded"
    unknown = [name for name, facts in provenance["data"].items() if facts["license"] is None]
    if unknown:
        yield f"warning: no license is given for {', '.join(unknown)}; add them under `data` in {recipe_path}"


def _export(recipe: ReleaseRecipe, folder: Path) -> None:
    """Export the model as a Hugging Face folder, without its own model card."""
    model = recipe.model
    if not model.is_dir():
        raise ReleaseError(f"model: {model} is not a folder; give a Hugging Face folder or a checkpoint")
    if (model / "config.json").exists():
        shutil.copytree(model, folder)
    elif convert(["to-hf", "--input", str(model), "--output", str(folder), "--quiet"]):
        raise ReleaseError(f"model: {model} could not be exported")
    (folder / CARD).unlink(missing_ok=True)
    if not (folder / "tokenizer.json").exists():
        raise ReleaseError(f"model: {model} has no tokenizer.json, which is needed to reread the steps")
    if recipe.merge is not None:
        for name in ("merge.yml", "merge_report.json"):
            found = sorted(recipe.merge.rglob(name))  # next to Hugging Face weights, in a subfolder of NeoX weights
            if not found:
                raise ReleaseError(f"merge: {recipe.merge} has no {name}; give the folder that tools/merge wrote")
            shutil.copyfile(found[0], folder / name)


def _provenance(recipe: ReleaseRecipe, vocab_file: Path) -> dict[str, Any]:
    stages = [stage_facts(entry, vocab_file, recipe.record_steps) for entry in recipe.stages]
    prefixes: dict[str, Path] = {}
    for entry in recipe.stages:
        config = read_manifest(find_checkpoint(entry.checkpoint)).provenance["config"]
        for name, path in prefixes_of(config).items():
            if prefixes.setdefault(name, path) != path:
                raise ReleaseError(f"two stages have a source {name}: {prefixes[name]} and {path}; rename one")
    unknown = sorted(set(recipe.data) - {_short(name) for name in prefixes} - set(prefixes))
    if unknown:
        raise ReleaseError(f"data: no stage reads {', '.join(unknown)}; sources are {', '.join(sorted(prefixes))}")
    return {
        "name": recipe.name,
        "license": recipe.license,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "base_models": recipe.base_models,
        "stages": stages,
        "data": {
            name: data_facts(path, recipe.data.get(name) or recipe.data.get(_short(name)))
            for name, path in prefixes.items()
        },
        "evaluation": [{"name": one.name, **_evaluation(one.summary)} for one in recipe.evaluation],
    }


def _short(name: str) -> str:
    return name.removesuffix("_document").removesuffix("_label").removesuffix("_text")


def _evaluation(path: Path) -> dict[str, Any]:
    """The content of a test's result file, without paths of this machine."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReleaseError(f"evaluation: {path} cannot be read: {error}") from None
    if "accuracy" in content:
        kept = ("n", "correct", "accuracy", "wilson_95", "topics", "protocol", "precision", "unparsed_items")
        facts = {key: content[key] for key in kept if key in content}
        return {"kind": "multiple choice", **facts, "questions_sha256": content["questions"]["sha256"]}
    if "results" in content:
        losses = {name: result["loss"] for name, result in content["results"].items()}
        return {"kind": "validation loss, nats per token", "losses": losses}
    raise ReleaseError(f"evaluation: {path} is neither mcq.py's summary.json nor eval.py's eval_results.json")
