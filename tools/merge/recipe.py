"""The recipe of a merge: models with their weights, a base, a method. Nothing here opens a file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from .errors import MergeError
from .parameters import Setting, depth, resolve

DELTA_METHODS = ("task_arithmetic", "ties", "dare_linear", "dare_ties")
DARE = ("dare_linear", "dare_ties")
ELECTS_SIGN = ("ties", "dare_ties")


@dataclass(frozen=True)
class ParentEntry:
    """A model to read: its path, its label, and the information missing from its files."""

    path: Path
    label: str
    adapter: Path | None = None
    adapter_base: str | None = None
    hf_source: Path | None = None
    license: str | None = None
    given: str = "{}"  # fields missing from config.json, as JSON

    @property
    def place(self) -> tuple[str, str]:
        return os.path.abspath(self.path), os.path.abspath(self.adapter) if self.adapter else ""


@dataclass(frozen=True)
class ModelEntry:
    """A model to merge: its delta is relative to `base`, or to the recipe's base model if that is None."""

    parent: ParentEntry
    settings: dict[str, Setting]
    base: ParentEntry | None = None


@dataclass(frozen=True)
class TensorSettings:
    """The numbers for one tensor; weights and densities are in the order of `Recipe.models`."""

    weights: tuple[float, ...]
    densities: tuple[float, ...]
    scale: float  # mergekit's lambda
    t: float


@dataclass
class Recipe:
    """A merge. `models` are sorted by label, which fixes the order of all sums independently of the YAML's order."""

    method: str
    models: list[ModelEntry]
    base: ParentEntry | None
    settings: dict[str, Setting] = field(default_factory=dict)
    normalize: bool = False
    rescale: str = "none"  # probability | l1 | none
    seed: int = 0
    out_dtype: str | None = None
    side_files: str | None = None  # a label
    name: str | None = None
    notes: list[str] = field(default_factory=list)
    text: str = ""  # the YAML as given

    @property
    def parents(self) -> list[ParentEntry]:
        """Every model to read, once: the base, the models, and the models' own bases."""
        found = [self.base, *(m.parent for m in self.models), *(m.base for m in self.models)]
        return list(dict.fromkeys(p for p in found if p is not None))

    def tensor_settings(self, tensor: str, num_layers: int) -> TensorSettings:
        """The numbers for one tensor; MergeError if one is missing or invalid."""
        at = depth(tensor, num_layers)
        weights, densities = [], []
        for model in self.models:
            where = f"{model.parent.label}, tensor {tensor}"
            scopes = (model.settings, self.settings)
            weight = resolve([s.get("weight") for s in scopes], tensor, at)
            if weight is None and self.method != "slerp":
                raise MergeError(f"{where}: no weight; add `parameters: {{weight: ...}}` to the model's entry")
            density = resolve([s.get("density") for s in scopes], tensor, at)
            if density is not None and not 0 < density <= 1:
                raise MergeError(f"{where}: density {density:g} must be above 0 and at most 1")
            weights.append(1.0 if weight is None else weight)
            densities.append(1.0 if density is None else density)
        scale = resolve([self.settings.get("lambda")], tensor, at)
        t = resolve([self.settings.get("t")], tensor, at)
        if self.method == "slerp" and (t is None or not 0 <= t <= 1):
            given = "is missing" if t is None else f"is {t:g}"
            raise MergeError(f"tensor {tensor}: slerp's t {given}; it must be between 0 (the base model) and 1")
        return TensorSettings(tuple(weights), tuple(densities), 1.0 if scale is None else scale, t or 0.0)
