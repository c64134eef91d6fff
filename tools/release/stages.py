"""The provenance of each training stage: configuration, position, data, compute, and the content of its steps."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from megatron.checkpoint.discovery import find_checkpoint
from megatron.checkpoint.manifest import read_manifest
from megatron.data.header import read_header
from megatron.data.indexed import bin_path, idx_path
from tools.release.hashes import file_facts
from tools.release.recipe import DataEntry, ReleaseError, StageEntry
from tools.release.steps import PATHS, StepReader, portable, source_names


def stage_facts(entry: StageEntry, vocab_file: Path, recorded: Literal["all"] | int) -> dict[str, Any]:
    """All facts of one stage. ReleaseError if the steps of the run cannot be reread."""
    folder = find_checkpoint(entry.checkpoint)
    provenance = read_manifest(folder).provenance
    if provenance.get("written_by") != "training":
        raise ReleaseError(f"{folder} was not written by a training run; give the `save` folder of stage {entry.name}")
    config, batch, end = provenance["config"], provenance["train_batch_size"], provenance["iteration"]
    logs = entry.logs or (Path(config["log_dir"]) if config.get("log_dir") else None)
    starts = list(_lines(logs / "starts.jsonl")) if logs is not None else []
    first = starts[0]["iteration"] if starts else 0
    length = starts[-1]["train_iters"] if starts else provenance["facts"]["run"].get("train_iters") or end
    if logs is not None:
        _refuse_other_positions(logs, batch, entry.name, skips=bool(config.get("skip_sample_ranges")))
    # Reread the steps to record, all or a fixed sample of them.
    reader = StepReader(config, batch, length, prefixes_of(config), vocab_file)
    numbers = range(first + 1, end + 1)
    if recorded != "all" and recorded < len(numbers):
        numbers = sorted(random.Random(0).sample(numbers, recorded))  # type: ignore[assignment]
    return {
        "name": entry.name,
        "checkpoint": {"iteration": end, "manifest": file_facts(folder / "manifest.json")["sha256"]},
        "first_step": first + 1,
        "train_iters": length,
        "batch": batch,
        "config": portable(config),
        "layout": provenance.get("layout"),
        "precision": provenance.get("precision"),
        "commit": provenance.get("commit"),
        "versions": provenance.get("versions"),
        "sources": source_names(config),
        "data": starts[0]["data"] and [{**one, "source": Path(one["source"]).name} for one in starts[0]["data"]]
        if starts
        else None,
        "compute": compute(logs, starts),
        "steps": [reader.step(number).record for number in numbers],
    }


def prefixes_of(config: Mapping[str, Any]) -> dict[str, Path]:
    """The prefix of each source of a run, by name. ReleaseError if two have the same name."""
    entries = [entry for key in PATHS for entry in config.get(key) or []]
    found: dict[str, Path] = {}
    for entry in entries:
        path = Path(entry["path"] if isinstance(entry, dict) else entry)
        if found.setdefault(path.name, path) != path:
            raise ReleaseError(f"two sources have the name {path.name}: {found[path.name]} and {path}; rename one")
    return found


def data_facts(prefix: Path, known: DataEntry | None) -> dict[str, Any]:
    """A source's files with their hashes, counts from its header, and the publisher's facts."""
    header = read_header(prefix)
    files = {path.name: file_facts(path) for path in (bin_path(prefix), idx_path(prefix))}
    facts: dict[str, Any] = {"license": known.license if known else None, "origin": known.origin if known else ""}
    if header is not None:
        path = Path(f"{prefix}.json")
        files[path.name] = file_facts(path)
        facts |= {"documents": header.documents, "tokens": header.tokens}
        facts |= {"made_from": [Path(source).name for source in header.sources]}
    return {**facts, "files": files}


def compute(logs: Path | None, starts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Steps, tokens, hours and FLOPs of a run, from its logs; None without logs."""
    if logs is None or not starts or not (logs / "metrics.jsonl").exists():
        return None
    records = [record for record in _lines(logs / "metrics.jsonl") if "time" in record]
    steps = len({record["iteration"] for record in records if "train/lm_loss" in record})
    tokens = steps * starts[-1]["batch"] * starts[-1]["seq_length"]
    begins = [start["time"] for start in starts[1:]] + [float("inf")]
    spans = [
        max((r["time"] for r in records if start["time"] <= r["time"] < end), default=start["time"]) - start["time"]
        for start, end in zip(starts, begins, strict=True)
    ]
    return {
        "steps": steps,
        "tokens": tokens,
        "ranks": starts[-1]["ranks"],
        "hours": sum(spans) / 3600,
        "model_flops": tokens * starts[-1]["flops_per_token"],
    }


def _refuse_other_positions(logs: Path, batch: int, name: str, *, skips: bool) -> None:
    """ReleaseError if the batch changed during the run: its steps then do not follow from its configuration.

    A run with `skip_sample_ranges` (`skips`) moves on by more than a batch where it skips.
    """
    path = logs / "metrics.jsonl"
    if not path.exists():
        return
    consumed = {r["iteration"]: r["train/consumed_samples"] for r in _lines(path) if "train/consumed_samples" in r}
    for step, samples in consumed.items():
        taken = samples - consumed.get(step - 1, samples - batch)
        if taken < batch or (taken > batch and not skips):
            raise ReleaseError(
                f"{path}: step {step} of stage {name} read {taken} samples, but the last "
                f"steps read {batch}; steps of a run whose batch has changed cannot be reread from its configuration"
            )


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue  # the last line of a run that was killed
