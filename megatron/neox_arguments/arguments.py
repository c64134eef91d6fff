"""`NeoXArgs`: the merged, checked and derived configuration, one flat object with GPT-NeoX's names."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, PrivateAttr, ValidationError

from megatron.common.errors import ConfigError
from megatron.neox_arguments.deepspeed_config import deepspeed_dictionary
from megatron.neox_arguments.keys.all_keys import REGISTRY, AllKeys
from megatron.neox_arguments.keys.fields import nested_mapping
from megatron.neox_arguments.load import apply_overrides, canonical, merge_files
from megatron.neox_arguments.partly_wrong import unsettle, valid_part
from megatron.neox_arguments.paths import expand_paths
from megatron.neox_arguments.registry import Task, as_one_message
from megatron.neox_arguments.review import review


class NeoXArgs(AllKeys):
    """Immutable. Build it with `from_ymls` or `from_dict`; change it with `replace`, which checks again.

    Every declared key holds its final value: `num_kv_heads`, the batch sizes, `precision` and all others that may be
    left out are filled in. `task` says what is checked: what the program of that name needs, or for `model` only what
    describes the model and its layout.
    """

    _notes: tuple[str, ...] = PrivateAttr(default=())
    _task: Task = PrivateAttr(default="train")

    @classmethod
    def from_ymls(
        cls,
        paths: Iterable[str | Path],
        overrides: dict[str, Any] | None = None,
        world_size: int | None = None,
        *,
        task: Task = "train",
        paths_on_nodes: bool = False,
    ) -> Self:
        """Merge YAML files, apply overrides (`{"train_iters": 10, "optimizer.params.lr": 1e-5}`), derive and check.

        `world_size` is the number of ranks when the caller knows it. With `paths_on_nodes`, `~` and `$VARIABLES` in
        paths stay as they are, for the compute nodes to expand. Raises ConfigError, which lists every problem.
        """
        keys, places = merge_files(paths)
        apply_overrides(keys, places, overrides or {})
        return cls._build(keys, places, world_size, task, paths_on_nodes)

    @classmethod
    def from_dict(cls, keys: dict[str, Any], world_size: int | None = None, *, task: Task = "train") -> Self:
        """As `from_ymls`, for keys that are already in memory."""
        named: dict[str, Any] = {}
        for spelled, value in keys.items():
            name = canonical(spelled)
            if name in named:
                raise ConfigError(f"{name} is given twice, with - and with _; delete one")
            named[name] = value
        return cls._build(named, {}, world_size, task)

    @classmethod
    def _build(
        cls,
        keys: dict[str, Any],
        places: dict[str, str],
        world_size: int | None,
        task: Task,
        paths_on_nodes: bool = False,
    ) -> Self:
        """Derive and check. One ConfigError lists every problem: first if the model is no Llama, then key by key."""
        keys = _with_known_words(keys, cls)
        foreign = review(keys, places, set(cls.model_fields))
        # As in GPT-NeoX, null is the same as leaving the key out.
        given = {name: value for name, value in foreign.keys.items() if name in cls.model_fields and value is not None}
        problems = list(foreign.problems)
        if not paths_on_nodes:
            given, unset = expand_paths(given)
            problems += unset
        try:
            raw: AllKeys = cls.model_validate(given)
        except ValidationError as error:
            problems += _explain(error, places, cls, foreign.answered)
            raw = valid_part(given, {str(item["loc"][0]) for item in error.errors()})
        except RecursionError:
            raise ConfigError("a value of the configuration contains itself; remove the self-reference") from None
        # Problems with the sizes of another kind of model, or of an old MLP, would only distract.
        if foreign.other_model or "mlp_type" in keys:
            raw = unsettle(raw, ("intermediate_size", "expansion_factor", "mlp_multiple_of", "num_kv_heads"))
        raw._merged = dict(keys)
        args, choices, contradictions = REGISTRY.derive(raw, task, world_size, unsettle)
        args._merged = dict(keys)
        problems += [*contradictions, *REGISTRY.problems(args, task)]
        if problems or not isinstance(args, cls):
            raise ConfigError(as_one_message(problems))
        args._task = task
        args._notes = (*foreign.notes, *choices, *REGISTRY.surprises(args, task))
        return args

    def replace(self, **keys: Any) -> Self:
        """The same configuration with some keys changed."""
        return self._build({**self._merged, **keys}, {}, self.global_num_gpus, self._task)

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines to print at start: choices made for the user, keys without effect, legal surprises."""
        return self._notes

    @property
    def task(self) -> Task:
        return self._task

    @property
    def deepspeed_config(self) -> dict[str, Any]:
        """Argument for `deepspeed.initialize(config=...)`; a fresh dictionary each time."""
        return deepspeed_dictionary(self)

    def to_json(self) -> str:
        """Everything that `from_json` needs, as text that is identical for equal configurations."""
        content = {"task": self._task, "merged": self._merged, "notes": self._notes, "resolved": self.model_dump()}
        return json.dumps(content, sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The object that `to_json` described, without deriving or checking again: all ranks hold equal ones."""
        content = json.loads(text)
        resolved = {name: value for name, value in content["resolved"].items() if value is not None}
        args = cls.model_validate(resolved)
        args._merged, args._task, args._notes = content["merged"], content["task"], tuple(content["notes"])
        return args

    @property
    def digest(self) -> str:
        """SHA-256 of `to_json`, in hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def _with_known_words(keys: dict[str, Any], cls: type[NeoXArgs]) -> dict[str, Any]:
    """The keys with the case of choices corrected: they are case-insensitive, as in GPT-NeoX (`launcher: SLURM`)."""
    result = dict(keys)
    for name, value in keys.items():
        field = cls.model_fields.get(name)
        if field is None or not isinstance(value, str) or get_origin(field.annotation) is not Literal:
            continue
        words = {str(word).lower(): word for word in get_args(field.annotation) if isinstance(word, str)}
        result[name] = words.get(value.lower(), value)
    return result


def _explain(
    error: ValidationError, places: dict[str, str], cls: type[NeoXArgs], answered: frozenset[str]
) -> list[str]:
    """Pydantic's findings, one line each: file and line, key, what was given, what was expected.

    Keys for which there is already a better message (`answered`) are left out.
    """
    lines = []
    for item in error.errors():
        path = [part for part in item["loc"] if isinstance(part, str | int)]
        top = str(path[0]) if path else ""
        if top in answered:
            continue
        name = ".".join(map(str, path))
        place = f"{places[top]}: " if top in places else ""
        description = (cls.model_fields[top].description or "") if len(path) == 1 and top in cls.model_fields else ""
        if item["type"] == "missing":
            lines.append(f"{place}{name} is missing. {description}".rstrip())
        elif item["type"] == "extra_forbidden":
            siblings = _nested_keys(cls, path[:-1])
            near = difflib.get_close_matches(str(path[-1]), siblings, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else f"{'.'.join(map(str, path[:-1]))} has {', '.join(siblings)}"
            if path[-1] in cls.model_fields and path[-1] not in near:
                hint = f"{path[-1]} is a top-level key, not part of {path[0]}"
            lines.append(f"{place}unknown key {name}; {hint}")
        elif item["type"] == "value_error":
            lines.append(f"{place}{name}: {item['msg'].removeprefix('Value error, ')}")
        else:
            expected = item["msg"].replace("Input should", "it should", 1)
            lines.append(f"{place}{name}: given {item['input']!r}, but {expected}. {description}".rstrip())
    return lines


def _nested_keys(cls: type[NeoXArgs], path: list[str | int]) -> list[str]:
    """Names of the keys inside the nested mapping at `path`."""
    model: type[BaseModel] = cls
    for part in path:
        if part in model.model_fields:  # other parts are list indices and names of union members
            nested = nested_mapping(model.model_fields[str(part)].annotation)
            if nested is None:
                return []
            model = nested
    return sorted(model.model_fields)
