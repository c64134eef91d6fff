"""Typed values of a recipe's YAML; MergeError names the key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..convert_hf.formats.dtypes import ALIASES
from .errors import MergeError


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """`value`, which must be a mapping with string keys."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise MergeError(f"{where} must be a mapping with text keys, not {str(value)[:60]!r}")
    return value


def refuse_unknown(raw: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    unknown = sorted(set(raw) - set(known))
    if unknown:
        raise MergeError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def word(raw: Mapping[str, Any], key: str, where: str) -> str | None:
    """The line of text under `key`; None if it is absent."""
    value = raw.get(key)
    if value is not None and (not isinstance(value, str) or not value.strip() or not value.isprintable()):
        raise MergeError(f"{where}: {key} must be a line of text, not {str(value)[:60]!r}")
    return value


def output_dtype(raw: Mapping[str, Any], where: str) -> tuple[str | None, list[str]]:
    """The merged weights' type (None: that of the parents) and remarks, from mergekit's `dtype` and `out_dtype`."""
    for key in ("dtype", "out_dtype"):
        value = raw.get(key)
        if value is not None and (not isinstance(value, str) or value not in ALIASES):
            raise MergeError(f"{where}: {key} must be one of {', '.join(ALIASES)}, not {str(value)[:60]!r}")
    given = raw.get("out_dtype") or raw.get("dtype")
    remarks = []
    if raw.get("dtype") and ALIASES[raw["dtype"]] != "float32":
        remarks = [f"dtype is {raw['dtype']}, but the arithmetic is fp32, with one rounding to the output's type"]
    return (ALIASES[given] if given else None), remarks
