"""Verify a release on another machine, and reread the steps of its training stages."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.common.errors import UserError
from megatron.common.quantity import quantity
from tools.release.hashes import PROVENANCE, file_facts, folder_facts, unsealed
from tools.release.recipe import ReleaseError
from tools.release.steps import StepReader

Found = tuple[list[str], list[str]]
"""The checks done, and the problems found."""


def verify_release(folder: Path, data: Sequence[Path], steps: int, seed: int) -> Found:
    """Check a release, and the data and steps for which `data` has files. ReleaseError if it is not a release."""
    content, damaged = _open(folder)
    checks, problems = [], [damaged] if damaged else []
    wrong = _compare(content["files"], folder_facts(folder), "")
    problems += wrong
    checks.append(f"{quantity(len(content['files']), 'file')} of the release compared")
    # The data, if given.
    if not data:
        checks.append("data: not checked; give the folders that hold them with --data")
        return checks, problems
    there, missing = _find_data(content, data)
    problems += missing.values()
    good = {name for name, files in there.items() if not _check_source(content["data"][name], files, content, problems)}
    checks.append(f"{len(there)} of {len(content['data'])} data sources found and compared")
    # A sample of each stage's recorded steps.
    for stage in content["stages"]:
        lacking = sorted(set(stage["sources"]) - good)
        if lacking:
            checks.append(f"stage {stage['name']}: steps not reread, missing {', '.join(lacking)}")
            continue
        records = random.Random(seed).sample(stage["steps"], min(steps, len(stage["steps"])))
        try:
            reader = _reader(folder, stage, there)
            wrong = [line for record in records for line in _step_problems(reader, record, stage["name"])]
        except UserError as error:
            problems.append(f"stage {stage['name']}: its steps cannot be reread: {error}")
            continue
        problems += wrong
        checks.append(f"stage {stage['name']}: {len(records)} of {len(stage['steps'])} recorded steps reread")
    return checks, problems


def show_step(folder: Path, stage_name: str, number: int, data: Sequence[Path]) -> list[str]:
    """Lines with the documents of each sample of a step, its digests, and whether they match the record."""
    content, damaged = _open(folder)
    if damaged:
        raise ReleaseError(damaged)
    stages = {stage["name"]: stage for stage in content["stages"]}
    if stage_name not in stages:
        raise ReleaseError(f"there is no stage {stage_name}; the release has {', '.join(stages)}")
    stage = stages[stage_name]
    first, last = stage["first_step"], stage["checkpoint"]["iteration"]
    if not first <= number <= last:
        raise ReleaseError(f"stage {stage_name} has steps {first} to {last}, not {number}")
    there, missing = _find_data(content, data)
    lacking = [line for source, line in missing.items() if source in stage["sources"]]
    if lacking:
        raise ReleaseError("; ".join(lacking))
    step = _reader(folder, stage, there).step(number)
    lines = [f"sample {n}: {', '.join(names)}" for n, names in enumerate(step.documents)]
    lines.append(f"SHA-256 of ids and labels: {step.record['ids']}")
    recorded = next((record for record in stage["steps"] if record["step"] == number), None)
    if recorded is None:
        return [*lines, "this step was not recorded"]
    return [*lines, "as recorded" if recorded == step.record else "DIFFERENT from the record"]


def _open(folder: Path) -> tuple[dict[str, Any], str | None]:
    path = folder / PROVENANCE
    if not path.is_file():
        raise ReleaseError(f"{folder} has no {PROVENANCE}; give the folder that `tools/release make` wrote")
    content, damaged = unsealed(path)
    if content.get("format") != "neox-llama-release" or content.get("version") != 1:
        raise ReleaseError(f"{path} says format {content.get('format')!r}, version {content.get('version')!r}")
    return content, damaged


def _compare(wanted: Mapping[str, Any], found: Mapping[str, Any], where: str) -> list[str]:
    """Lines about files that are missing, changed, swapped or not part of the release."""
    by_hash = {facts["sha256"]: name for name, facts in wanted.items()}
    lines = [f"{where}{name} is missing" for name in wanted if name not in found]
    for name, facts in found.items():
        if name not in wanted:
            lines.append(f"{where}{name} is not a file of the release")
        elif facts["sha256"] != wanted[name]["sha256"]:
            other = by_hash.get(facts["sha256"])
            what = f"has the content of {other}" if other else "was changed"
            size = (
                ""
                if facts["bytes"] == wanted[name]["bytes"]
                else f" ({facts['bytes']} bytes, not {wanted[name]['bytes']})"
            )
            lines.append(f"{where}{name} {what}{size}")
    return lines


def _find_data(
    content: Mapping[str, Any], folders: Iterable[Path]
) -> tuple[dict[str, dict[str, Path]], dict[str, str]]:
    """The files of each complete source by name, and a line about each incomplete one."""
    there: dict[str, dict[str, Path]] = {}
    missing: dict[str, str] = {}
    listed = list(folders)
    for folder in listed:
        if not folder.is_dir():
            raise ReleaseError(f"--data {folder} is not a folder")
    for source, facts in content["data"].items():
        files = {
            name: next((folder / name for folder in listed if (folder / name).is_file()), None)
            for name in facts["files"]
        }
        lacking = [name for name, path in files.items() if path is None]
        if lacking:
            missing[source] = f"data source {source}: {', '.join(lacking)} is missing in {', '.join(map(str, listed))}"
        else:
            there[source] = {name: path for name, path in files.items() if path is not None}
    return there, missing


def _check_source(
    facts: Mapping[str, Any], files: Mapping[str, Path], content: Mapping[str, Any], problems: list[str]
) -> bool:
    """Whether a source's files have problems, which are added to `problems`."""
    everything = {name: one for source in content["data"].values() for name, one in source["files"].items()}
    found = {name: file_facts(path) for name, path in files.items()}
    folders = {name: f"{path.parent}/" for name, path in files.items()}
    lines = [
        line
        for name in found
        for line in _compare(everything, {name: found[name]}, folders[name])
        if not line.endswith("is missing")
    ]
    problems += lines
    return bool(lines)


def _reader(folder: Path, stage: Mapping[str, Any], there: Mapping[str, Mapping[str, Path]]) -> StepReader:
    prefixes = {
        source: next(path for name, path in files.items() if name.endswith(".bin")).with_suffix("")
        for source, files in there.items()
    }
    return StepReader(stage["config"], stage["batch"], stage["train_iters"], prefixes, folder / "tokenizer.json")


def _step_problems(reader: StepReader, record: Mapping[str, Any], stage: str) -> list[str]:
    found = reader.step(record["step"]).record
    names = {"ids": "token ids", "documents": "documents"}
    return [
        f"stage {stage}, step {record['step']}: its {what} differ from the record"
        for key, what in names.items()
        if found[key] != record[key]
    ]
