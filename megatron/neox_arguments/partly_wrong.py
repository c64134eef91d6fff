"""A configuration in which some keys have no valid value, so that problems with the other keys are found as well."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from pydantic import PrivateAttr

from megatron.neox_arguments.keys.all_keys import AllKeys
from megatron.neox_arguments.registry import UnsettledError


class PartlyWrong(AllKeys):
    """Keys of which some are unsettled: reading one, directly or through a property, raises UnsettledError."""

    _unsettled: frozenset[str] = PrivateAttr(default=frozenset())

    def __getattribute__(self, name: str) -> Any:
        try:
            private = object.__getattribute__(self, "__pydantic_private__")
        except AttributeError:  # during construction
            private = None
        if private is not None and name in private.get("_unsettled", ()):
            raise UnsettledError(name)
        return super().__getattribute__(name)


def unsettle(args: AllKeys, names: Iterable[str]) -> AllKeys:
    """The same keys, with those in `names` marked as unsettled."""
    before = args._unsettled if isinstance(args, PartlyWrong) else frozenset()
    values = {name: args.__dict__[name] for name in AllKeys.model_fields}
    result = PartlyWrong.model_construct(None, **values)
    result._merged = args._merged
    result._unsettled = before | frozenset(names)
    return result


def valid_part(given: dict[str, Any], wrong: set[str]) -> AllKeys:
    """`given` without the keys in `wrong`, which are unsettled. Required ones among them hold a placeholder."""
    kept = {name: value for name, value in given.items() if name not in wrong}
    for name in wrong & set(AllKeys.model_fields):
        field = AllKeys.model_fields[name]
        if field.is_required():
            literal = get_origin(field.annotation) is Literal
            kept[name] = get_args(field.annotation)[0] if literal else 1
    return unsettle(AllKeys.model_validate(kept), wrong)
