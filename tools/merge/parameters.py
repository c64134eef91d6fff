"""mergekit's parameter settings: a number, a gradient over depth, or either of these by tensor name.

weight: 0.7
weight: [0.2, 0.8]                  # first layer to last, linear in between; tensors outside layers get the first
weight:
  - {filter: mlp, value: [0, 1]}    # names that contain "mlp"
  - value: 0.5                      # all others
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import MergeError

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Choice:
    """One entry of a setting; applies to names that contain `filter` (None: to all)."""

    filter: str | None
    values: tuple[float, ...]

    def applies(self, tensor: str) -> bool:
        return self.filter is None or self.filter == "*" or self.filter in tensor


Setting = tuple[Choice, ...]


def depth(tensor: str, num_layers: int) -> float:
    """Depth of a tensor between the first layer (0) and the last (1); 0 for embedding, final norm and head."""
    match = _LAYER.match(tensor)
    if match is None:
        return 0.0
    return int(match[1]) / (num_layers - 1) if num_layers > 1 else 1.0


def parse_setting(value: Any, where: str) -> Setting:
    """Parse a setting; MergeError names `where`."""
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return tuple(_choice(item, where) for item in value)
    return (Choice(None, _values(value, where)),)


def _choice(item: Any, where: str) -> Choice:
    if not isinstance(item, Mapping) or "value" not in item or set(item) - {"filter", "value"}:
        raise MergeError(f"{where}: {item!r} must be a number, or a mapping with `value` and optionally `filter`")
    name = item.get("filter")
    if name is not None and not isinstance(name, str):
        raise MergeError(f"{where}: filter {name!r} must be a part of a tensor's name")
    return Choice(name, _values(item["value"], where))


def _values(value: Any, where: str) -> tuple[float, ...]:
    items = value if isinstance(value, list) else [value]
    if not items:
        raise MergeError(f"{where} is an empty list; give a number or a list of numbers")
    return tuple(parse_number(item, where) for item in items)


def parse_number(value: Any, where: str) -> float:
    """A finite number, even if YAML reads it as text (1e-3)."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise MergeError(f"{where} must be a finite number, not {str(value)[:60]!r}")
    return number


def resolve(settings: Iterable[Setting | None], tensor: str, at: float) -> float | None:
    """The value for a tensor at depth `at`, from the first setting that has one; None if none does."""
    for setting in settings:
        for choice in setting or ():
            if choice.applies(tensor):
                return _interpolate(choice.values, at)
    return None


def _interpolate(values: tuple[float, ...], at: float) -> float:
    place = at * (len(values) - 1)
    first = int(place)
    second = min(len(values) - 1, first + 1)
    part = place - first
    return (1 - part) * values[first] + part * values[second]


def unused_filters(setting: Setting, tensors: Iterable[str]) -> list[str]:
    """Filters that no tensor's name contains."""
    names = list(tensors)
    return [c.filter for c in setting if c.filter is not None and not any(c.applies(name) for name in names)]
