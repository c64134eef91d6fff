"""How a key is declared: `key` with a default, `required`, or `derived` from other keys when absent."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field


class Keys(BaseModel):
    """Base of every group of keys and of every nested mapping: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


def key(default: Any, description: str, *, ours: bool = False, **constraints: Any) -> Any:
    """A key with a plain default. `ours` marks keys that GPT-NeoX does not have."""
    return Field(default=default, description=description, json_schema_extra={"x-ours": ours}, **constraints)


def required(description: str, *, ours: bool = False, **constraints: Any) -> Any:
    """A key without a default: any guess could be wrong for some Llama."""
    return Field(description=description, json_schema_extra={"x-ours": ours, "x-required": True}, **constraints)


def derived(rule: str, description: str, *, ours: bool = False, **constraints: Any) -> Any:
    """A key that a derivation in its file fills by `rule` when the user does not give it.

    The declared type is the type after resolution, so that readers of `NeoXArgs` need no None checks.
    """
    return Field(
        default=None, description=description, json_schema_extra={"x-ours": ours, "x-derived": rule}, **constraints
    )


def nested_mapping(annotation: Any) -> type[Keys] | None:
    """The mapping that a key of this type holds, directly, in a list or in a union; None if it holds none."""
    if isinstance(annotation, type) and issubclass(annotation, Keys):
        return annotation
    found = (nested_mapping(part) for part in get_args(annotation))
    return next((part for part in found if part is not None), None)
