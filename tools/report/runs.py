"""Read the records of a run: metrics by step, the configuration of each stage, and results of other tools."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.common.errors import UserError

METRICS, STARTS = "metrics.jsonl", "starts.jsonl"
LOSS, RATE, NORM, SPEED = "train/lm_loss", "train/learning_rate", "train/grad_norm", "runtime/tokens_per_sec"
Curve = list[tuple[int, float]]


@dataclass
class TrainingStage:
    """One `metrics.jsonl`. `values` maps a metric's name to its value at each step; of repeated steps, the last."""

    name: str
    path: Path
    values: dict[str, dict[int, float]]
    starts: list[dict[str, Any]]
    began: float
    ended: float
    problems: list[str] = field(default_factory=list)

    def curve(self, name: str) -> Curve:
        """(step, value) pairs in order of steps."""
        return sorted(self.values.get(name, {}).items())

    @property
    def validation(self) -> dict[str, Curve]:
        """Validation loss of each source."""
        names = [name.split("/") for name in self.values]
        sources = [parts[1] for parts in names if len(parts) == 3 and (parts[0], parts[2]) == ("validation", "lm_loss")]
        return {source: self.curve(f"validation/{source}/lm_loss") for source in sources}

    @property
    def first(self) -> int:
        return min(step for steps in self.values.values() for step in steps)

    @property
    def last(self) -> int:
        return max(step for steps in self.values.values() for step in steps)

    @property
    def overrides(self) -> list[tuple[int, float]]:
        """(step, factor) of manual learning-rate adjustments, from the configuration of the last start."""
        given = self.starts[-1].get("lr_overrides") or [] if self.starts else []
        return [(int(one["at"]), float(one["scale"])) for one in given]

    @property
    def tokens(self) -> float | None:
        """Tokens processed, including padding; None if no start was recorded."""
        if not self.starts:
            return None
        steps = len(self.values.get(LOSS, {}))
        return float(steps * self.starts[-1]["batch"] * self.starts[-1]["seq_length"])


@dataclass
class Score:
    """A test by mcq.py: its summary, with the accuracy overall and by topic."""

    name: str
    summary: dict[str, Any]

    def of(self, topic: str | None) -> dict[str, Any] | None:
        """The summary of a topic (None: of all questions); None if it has no accuracy."""
        found = self.summary if topic is None else self.summary.get("topics", {}).get(topic)
        return found if isinstance(found, dict) and found.get("accuracy") is not None else None


@dataclass
class RecordedRun:
    name: str
    stages: list[TrainingStage]
    scores: list[Score] = field(default_factory=list)
    cleaning: dict[str, dict[str, Any]] = field(default_factory=dict)
    contamination: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def offsets(self) -> list[int]:
        """Steps to add to each stage's step numbers; 0 for a stage that continues the previous one's numbers."""
        found, end = [], 0
        for stage in self.stages:
            offset = 0 if stage.first >= end > 0 else end
            found.append(offset)
            end = offset + stage.last
        return found


def read_run(path: Path, leave_out: Path | None = None) -> RecordedRun:
    """Read a run from its folder or one metrics.jsonl. UserError if there is nothing to draw."""
    if path.is_file():
        return RecordedRun(path.parent.name, [_stage(path, path.parent.name)])
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; give a run's folder or its {METRICS}")
    files = [file for file in sorted(path.rglob(METRICS)) if leave_out is None or leave_out not in file.parents]
    if not files:
        raise UserError(f"{path} has no {METRICS}; runs write it to log_dir, which must be set")
    stages = [_stage(file, _name_below(file.parent, path)) for file in files]
    run = RecordedRun(path.resolve().name, sorted(stages, key=lambda stage: stage.began))
    for file in sorted(path.rglob("summary.json")):
        _add_summary(run, file, path)
    run.scores.sort(key=lambda score: score.summary.get("finished", 0.0))
    return run


def _name_below(folder: Path, root: Path) -> str:
    parts = [part for part in folder.relative_to(root).parts if part not in ("log", "logs")]
    return "/".join(parts) or root.resolve().name


def _stage(path: Path, name: str) -> TrainingStage:
    values: dict[str, dict[int, float]] = {}
    times: list[float] = []
    strange = 0
    for record in _records(path):
        step = record.get("iteration") if isinstance(record, dict) else None
        if not isinstance(step, int):
            strange += 1
            continue
        if isinstance(record.get("time"), int | float):
            times.append(record["time"])
        for key, value in record.items():
            if key not in ("iteration", "time") and _is_number(value):
                values.setdefault(key, {})[step] = float(value)
    if not values:
        raise UserError(f"{path} has no record of a step; expected lines such as {{'iteration': 1, '{LOSS}': 2.3}}")
    problems = [f"{strange} lines are not records of a step and were skipped"] if strange else []
    starts_path = path.with_name(STARTS)
    starts = list(_records(starts_path)) if starts_path.exists() else []
    known = [start for start in starts if isinstance(start, dict) and {"batch", "seq_length"} <= start.keys()]
    if len(known) < len(starts):
        problems.append(f"{len(starts) - len(known)} lines of {STARTS} are not records of a start and were skipped")
    return TrainingStage(name, path, values, known, min(times, default=0.0), max(times, default=0.0), problems)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _records(path: Path) -> Iterator[Any]:
    """The JSON lines of a file; None for an invalid line, such as the truncated last line of a killed run."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError:
                    yield None


def _add_summary(run: RecordedRun, file: Path, root: Path) -> None:
    """Classify a summary.json by its content; files of unknown commands are reported."""
    name = _name_below(file.parent, root)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        run.problems.append(f"{file} is not JSON ({error}) and was skipped")
        return
    if isinstance(content, dict) and "chosen_letters" in content and "accuracy" in content:
        content["finished"] = file.stat().st_mtime
        run.scores.append(Score(name.removeprefix("mcq/"), content))
    elif isinstance(content, dict) and "loop_characters" in content:
        run.cleaning[Path(content.get("output", name)).name] = content
    elif isinstance(content, dict) and "contaminated" in content:
        run.contamination[name] = content
    else:
        run.problems.append(f"{file} was not written by a known command and was skipped")
