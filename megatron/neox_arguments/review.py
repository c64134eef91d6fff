"""Review of the keys as the user gave them, before they are typed: unknown, old, refused and ineffective ones."""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple

from megatron.neox_arguments.family import other_model
from megatron.neox_arguments.old_words import OLD_WORDS, old_word, silu_was_swiglu
from megatron.neox_arguments.unsupported import (
    NESTED_WITHOUT_EFFECT,
    UNSUPPORTED,
    WITHOUT_EFFECT,
    WITHOUT_EFFECT_OF_TYPE,
    is_off,
)


class Review(NamedTuple):
    """`keys` without ineffective entries of mappings; `answered` are the keys that `problems` mentions.

    `other_model`: the configuration is not that of a dense Llama.
    """

    keys: dict[str, Any]
    problems: list[str]
    notes: list[str]
    answered: frozenset[str]
    other_model: bool


def review(keys: dict[str, Any], places: dict[str, str], known: set[str]) -> Review:
    """Problems with the keys themselves: the model first, then unsupported, old and unknown ones.

    `known` are this project's keys. One note names all given keys without effect.
    """
    problems: list[str] = []
    answered: set[str] = set()
    other = other_model(keys)
    if other is not None:
        problems.append(other.sentence)
        answered |= other.keys
    silu = silu_was_swiglu(keys)
    if silu is not None:
        problems.append(_place("activation", places) + silu)
        answered.add("activation")
    kept, idle = _without_idle_parts(keys)
    for name, (kind, reason) in WITHOUT_EFFECT_OF_TYPE.items():
        if isinstance(kept.get(name), kind) and not is_off(kept.pop(name)):
            idle.append((name, reason))
    for name, value in kept.items():
        if name in known or name in answered:
            continue
        if name in WITHOUT_EFFECT:
            if not is_off(value):
                idle.append((name, WITHOUT_EFFECT[name]))
            continue
        problem = _foreign(name, value, kept, known)
        if problem is not None:
            problems.append(_place(name, places) + problem)
    return Review(kept, problems, _note(idle), frozenset(answered), other is not None)


def _foreign(name: str, value: Any, keys: dict[str, Any], known: set[str]) -> str | None:
    if name in UNSUPPORTED:
        refusal = UNSUPPORTED[name]
        return None if refusal.accepts(value) else f"{name}: {value!r} is not supported. {refusal.reason}"
    old = old_word(name, value, keys)
    if old is not None:
        return old
    near = difflib.get_close_matches(name, [*known, *UNSUPPORTED, *WITHOUT_EFFECT, *OLD_WORDS], n=1, cutoff=0.6)
    return f"unknown key {name}" + (f"; did you mean {near[0]}?" if near else "; docs/configuration.md lists all keys")


def _place(name: str, places: dict[str, str]) -> str:
    return f"{places[name]}: " if name in places else ""


def _without_idle_parts(keys: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The keys without parts of mappings that have no effect, and these parts with their reasons."""
    result = dict(keys)
    idle: list[tuple[str, str]] = []
    for path, reasons in NESTED_WITHOUT_EFFECT.items():
        top, *inner = path.split(".")
        mapping = result.get(top)
        for name in inner:
            mapping = mapping.get(name) if isinstance(mapping, dict) else None
        if not isinstance(mapping, dict):
            continue
        found = [name for name in reasons if name in mapping]
        idle += [(f"{path}.{name}", reasons[name]) for name in found]
        pruned = {name: value for name, value in mapping.items() if name not in found}
        result[top] = {**result[top], inner[0]: pruned} if inner else pruned
    return result, idle


def _note(idle: list[tuple[str, str]]) -> list[str]:
    """One line for all keys without effect, those with the same reason together."""
    if not idle:
        return []
    by_reason: dict[str, list[str]] = {}
    for name, reason in idle:
        by_reason.setdefault(reason, []).append(name)
    parts = [f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()]
    return [f"without effect here: {'; '.join(parts)}"]
