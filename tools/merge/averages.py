"""Averages of a run's checkpoints, as linear merges weighted by age.

merge_method: average
checkpoints: checkpoints/cpt        # the folder of global_step* folders
last: 5                             # or steps: [1000, 1200, 1400]
parameters: {weighting: ema, decay: 0.8}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import MergeError
from .parameters import parse_number, parse_setting
from .recipe import ModelEntry, ParentEntry, Recipe
from .yaml_values import mapping, output_dtype, refuse_unknown, word

AVERAGE = "average"
_KEYS = ("merge_method", "checkpoints", "steps", "last", "parameters", "dtype", "out_dtype", "hf_source", "name")
_WEIGHTINGS = ("uniform", "linear", "ema")


def average(raw: Mapping[str, Any], where: str) -> Recipe:
    """The linear merge that is equivalent to an `average` recipe."""
    refuse_unknown(raw, _KEYS, where)
    folder = word(raw, "checkpoints", where)
    if folder is None:
        raise MergeError(f"{where}: average needs checkpoints, the folder that holds global_step* folders")
    root = Path(folder)
    if not root.is_dir():
        raise MergeError(f"{where}: checkpoints {folder} is not a folder")
    found = sorted(int(m[1]) for m in (re.fullmatch(r"global_step(\d+)", p.name) for p in root.iterdir()) if m)
    steps = _steps(raw, found, where)
    weights = _weighting(mapping(raw.get("parameters") or {}, f"{where}: parameters"), len(steps), where)
    source = word(raw, "hf_source", where)
    models = []
    for step, weight in zip(steps, weights, strict=True):
        label = f"global_step{step}"
        parent = ParentEntry(root / label, label, hf_source=Path(source) if source else None)
        models.append(ModelEntry(parent, {"weight": parse_setting(weight, "weight")}))
    dtype, notes = output_dtype(raw, where)
    return Recipe(
        method="linear",
        models=sorted(models, key=lambda m: m.parent.label),
        base=None,
        normalize=True,
        out_dtype=dtype,
        side_files=models[-1].parent.label,
        name=word(raw, "name", where),
        notes=[f"average of {len(steps)} checkpoints: steps {', '.join(map(str, steps))}", *notes],
    )


def _steps(raw: Mapping[str, Any], found: list[int], where: str) -> list[int]:
    steps, last = raw.get("steps"), raw.get("last")
    if (steps is None) == (last is None):
        raise MergeError(f"{where}: average needs either steps, a list of iterations, or last, a number of checkpoints")
    if last is not None:
        if not _whole(last) or not 2 <= last <= len(found):
            raise MergeError(
                f"{where}: last is {last!r}; expected 2 or more, and at most the {len(found)} checkpoints found"
            )
        return found[-last:]
    if not isinstance(steps, list) or len(steps) < 2 or not all(map(_whole, steps)) or len(set(steps)) < len(steps):
        raise MergeError(f"{where}: steps must be a list of at least two different iterations, not {str(steps)[:60]!r}")
    missing = sorted(set(steps) - set(found))
    if missing:
        raise MergeError(f"{where}: no checkpoint of step {', '.join(map(str, missing))}; found: {found}")
    return sorted(steps)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _weighting(given: Mapping[str, Any], count: int, where: str) -> list[float]:
    """Weights of the checkpoints, oldest first; only their ratios matter."""
    refuse_unknown(given, ("weighting", "decay"), f"{where}: parameters")
    kind = given.get("weighting", "uniform")
    if kind not in _WEIGHTINGS:
        raise MergeError(f"{where}: weighting must be one of {', '.join(_WEIGHTINGS)}, not {str(kind)[:60]!r}")
    if kind != "ema":
        if "decay" in given:
            raise MergeError(f"{where}: decay applies to weighting ema, not to {kind}")
        return [1.0 if kind == "uniform" else float(i + 1) for i in range(count)]
    decay = parse_number(given.get("decay"), f"{where}: decay")
    if not 0 < decay < 1:
        raise MergeError(f"{where}: decay is {decay:g}; it must be between 0 and 1")
    return [decay ** (count - 1 - i) for i in range(count)]
