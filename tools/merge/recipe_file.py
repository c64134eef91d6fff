"""Read recipes in mergekit's YAML, with a few additional keys.

Keys beyond mergekit's: `random_seed`, `side_files` and `name` at the top; `label`, `license`, `hf_source`, `set`,
`adapter`, `adapter_base` and `base` in a model's entry; `rescale: probability`; `merge_method: average` (see
`averages`). Unknown keys are errors, because silently ignoring a key changes the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from .averages import AVERAGE, average
from .errors import MergeError
from .parameters import parse_setting
from .recipe import DARE, DELTA_METHODS, ModelEntry, ParentEntry, Recipe
from .yaml_values import mapping, output_dtype, refuse_unknown, word

# Parameters of each method: per model, and global.
PARAMETERS = {
    "linear": ({"weight"}, {"normalize"}),
    "task_arithmetic": ({"weight"}, {"normalize", "lambda"}),
    "ties": ({"weight", "density"}, {"normalize", "lambda", "int8_mask"}),
    "dare_linear": ({"weight", "density"}, {"normalize", "lambda", "rescale"}),
    "dare_ties": ({"weight", "density"}, {"normalize", "lambda", "rescale", "int8_mask"}),
    "slerp": (set[str](), {"t"}),
}
_ELSEWHERE = (
    *("arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "karcher", "model_stock"),
    *("multislerp", "nearswap", "nuslerp", "passthrough", "ram", "ramplus_tl", "sce"),
)
_TOP = {"merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source"}
_OURS = {"random_seed", "side_files", "name"}
_REFUSED = {
    "slices": "layers cannot be rearranged; list whole models under `models`",
    "modules": "a Llama is one module; list whole models under `models`",
    "tokenizer": "parents must share one tokenizer; `side_files: LABEL` selects whose files are used",
    "chat_template": "the template comes with the tokenizer's files; `side_files: LABEL` selects whose",
}
_PARENT = {"model", "label", "license", "hf_source", "adapter", "adapter_base", "set"}


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that rejects repeated keys; the plain loader silently keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_recipe(path: Path) -> Recipe:
    """Read the recipe in a YAML file; MergeError names the wrong key."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise MergeError(f"{path} cannot be read: {reason}") from None
    try:
        raw = yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise MergeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    recipe = parse_recipe(raw, str(path))
    recipe.text = text
    return recipe


def parse_recipe(raw: Any, where: str) -> Recipe:
    """Parse a recipe; MergeError names `where` and the wrong key."""
    raw = mapping(raw, where)
    method = raw.get("merge_method")
    if method == AVERAGE:
        return average(raw, where)
    if not isinstance(method, str) or method not in PARAMETERS:
        known = ", ".join((*PARAMETERS, AVERAGE))
        also = "; mergekit has it, this command does not" if method in _ELSEWHERE else ""
        raise MergeError(f"{where}: merge_method {method!r} is not one of {known}{also}")
    for key, reason in _REFUSED.items():
        if key in raw:
            raise MergeError(f"{where}: {key} is not supported: {reason}")
    refuse_unknown(raw, _TOP | _OURS, where)
    base = _parent(raw["base_model"], f"{where}: base_model") if raw.get("base_model") is not None else None
    entries = raw.get("models")
    if not isinstance(entries, list) or not entries:
        raise MergeError(f"{where}: models must be a list of the models to merge")
    models = [_model(entry, f"{where}: models[{i}]", method) for i, entry in enumerate(entries)]
    models = _known_bases(models, base)
    recipe = Recipe(method, _roles(models, base, method, where), base, name=word(raw, "name", where))
    _whole_parameters(recipe, mapping(raw.get("parameters") or {}, f"{where}: parameters"), where)
    recipe.seed = _seed(raw.get("random_seed", 0), where)
    recipe.out_dtype, remarks = output_dtype(raw, where)
    recipe.notes += remarks
    _check_labels(recipe, where)
    recipe.side_files = _side_files(recipe, raw, where)
    _remarks(recipe, raw)
    return recipe


def _parent(value: Any, where: str) -> ParentEntry:
    """Parse a model: a path, `PATH+ADAPTER`, mergekit's `{model: {path: ...}}`, or a mapping with our keys."""
    raw = {"model": value} if isinstance(value, str) else dict(mapping(value, where))
    refuse_unknown(raw, _PARENT, where)
    path, adapter = raw.get("model"), word(raw, "adapter", where)
    if isinstance(path, Mapping) and isinstance(path.get("path"), str) and set(path) <= {"path", "revision"}:
        path = path["path"]
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise MergeError(f"{where}: model must be the path of a folder, not {str(path)[:60]!r}")
    if "+" in path and adapter is None and not Path(path).exists():
        path, _, adapter = path.partition("+")
    name = Path(os.path.abspath(path)).name
    label = word(raw, "label", where) or (f"{name}+{Path(os.path.abspath(adapter)).name}" if adapter else name)
    source = word(raw, "hf_source", where)
    return ParentEntry(
        path=Path(path),
        label=label,
        adapter=Path(adapter) if adapter else None,
        adapter_base=word(raw, "adapter_base", where),
        hf_source=Path(source) if source else None,
        license=word(raw, "license", where),
        given=_json(mapping(raw.get("set") or {}, f"{where}: set"), f"{where}: set"),
    )


def _json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise MergeError(f"{where} must be representable in config.json: {error}") from None


def _model(raw: Any, where: str, method: str) -> ModelEntry:
    raw = mapping({"model": raw} if isinstance(raw, str) else raw, where)
    refuse_unknown(raw, _PARENT | {"parameters", "base"}, where)
    parent = _parent({key: value for key, value in raw.items() if key in _PARENT}, where)
    base = None
    if raw.get("base") is not None:
        if method not in DELTA_METHODS:
            raise MergeError(f"{where}: base has no meaning for {method}; only {', '.join(DELTA_METHODS)} use deltas")
        base = _parent(raw["base"], f"{where}: base")
    given = mapping(raw.get("parameters") or {}, f"{where}: parameters")
    allowed = PARAMETERS[method][0]
    settings = {}
    for key, value in given.items():
        if key not in allowed:
            known = ", ".join(sorted(allowed)) or "none"
            raise MergeError(f"{where}: {key} is not a parameter of a model in {method}; known: {known}")
        settings[key] = parse_setting(value, f"{where}: {key}")
    return ModelEntry(parent, settings, base)


def _known_bases(models: list[ModelEntry], base: ParentEntry | None) -> list[ModelEntry]:
    """Replace a `base` given only as a path or label by the model that is fully described elsewhere."""
    bases = [m.base for m in models if m.base is not None and not _is_bare(m.base)]
    described = [m.parent for m in models] + bases + ([base] if base is not None else [])
    result = []
    for model in models:
        own = model.base
        if own is not None and _is_bare(own):
            same = (p for p in described if p.place == own.place or p.label == str(own.path))
            own = next(same, own)
        result.append(replace(model, base=own))
    return result


def _is_bare(parent: ParentEntry) -> bool:
    """Whether only a path was given."""
    return parent == ParentEntry(parent.path, Path(os.path.abspath(parent.path)).name)


def _roles(models: list[ModelEntry], base: ParentEntry | None, method: str, where: str) -> list[ModelEntry]:
    """The models to merge other than the base, by label. mergekit allows the base in the list as well."""
    if method == "linear":
        if base is not None:
            raise MergeError(f"{where}: linear does not use base_model; list it under models, or leave it out")
        return sorted(models, key=lambda m: m.parent.label)
    if base is None:
        raise MergeError(f"{where}: {method} needs base_model, the model that deltas are taken from")
    for model in models:
        if model.parent.place == base.place and model.settings:
            raise MergeError(
                f"{where}: {model.parent.label} is base_model: its delta is zero, so parameters have no effect on it"
            )
    others = [model for model in models if model.parent.place != base.place]
    if method == "slerp" and len(others) != 1:
        raise MergeError(f"{where}: slerp merges base_model and one other model, but {len(others)} others are given")
    if not others:
        raise MergeError(f"{where}: there is no model other than base_model")
    return sorted(others, key=lambda m: m.parent.label)


def _whole_parameters(recipe: Recipe, given: Mapping[str, Any], where: str) -> None:
    of_models, of_whole = PARAMETERS[recipe.method]
    for key in given:
        if key not in of_models | of_whole:
            known = ", ".join(sorted(of_models | of_whole))
            raise MergeError(f"{where}: {key} is not a parameter of {recipe.method}; known: {known}")
    recipe.normalize = recipe.method in ("linear", "ties")
    for key in ("normalize", "int8_mask"):
        if key in given and not isinstance(given[key], bool):
            raise MergeError(f"{where}: {key} must be true or false, not {str(given[key])[:60]!r}")
    recipe.normalize = given.get("normalize", recipe.normalize)
    if "int8_mask" in given:
        recipe.notes.append("int8_mask has no effect: no sign masks are kept in memory")
    if recipe.method in DARE:
        value = given.get("rescale", "probability")
        rescales = {"probability": "probability", "l1": "l1", True: "probability", False: "none"}
        if not isinstance(value, str | bool) or value not in rescales:
            raise MergeError(f"{where}: rescale must be probability, l1, true or false, not {str(value)[:60]!r}")
        recipe.rescale = rescales[value]
        if value is True:
            recipe.notes.append("rescale: true is read as probability (DARE's 1/p); mergekit's is called l1")
    for key in of_models | of_whole & {"lambda", "t"}:
        if key in given:
            recipe.settings[key] = parse_setting(given[key], f"{where}: {key}")


def _seed(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 64:
        raise MergeError(f"{where}: random_seed must be a whole number from 0 to 2^64 - 1, not {str(value)[:60]!r}")
    return value


def _check_labels(recipe: Recipe, where: str) -> None:
    by_label: dict[str, ParentEntry] = {}
    by_place: dict[tuple[str, str], ParentEntry] = {}
    for parent in recipe.parents:
        other = by_place.setdefault(parent.place, parent)
        if other.label != parent.label:
            raise MergeError(
                f"{where}: {parent.path} has the labels {other.label!r} and {parent.label!r}; give it one `label`"
            )
        other = by_label.setdefault(parent.label, parent)
        if other.place != parent.place:
            raise MergeError(
                f"{where}: {other.path} and {parent.path} both have the label {parent.label!r}; give one "
                f"another `label` (masks and the model card use it)"
            )
        if other != parent:
            raise MergeError(f"{where}: {parent.label!r} is described twice, with different keys; describe it once")
    labels = [model.parent.label for model in recipe.models]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise MergeError(f"{where}: {', '.join(twice)} appears twice among the models")
    for model in recipe.models:
        if model.base is not None and model.base.place == model.parent.place:
            raise MergeError(f"{where}: {model.parent.label} is its own base; its delta would be zero")


def _side_files(recipe: Recipe, raw: Mapping[str, Any], where: str) -> str | None:
    label = word(raw, "side_files", where)
    source = word(raw, "tokenizer_source", where)
    if label and source:
        raise MergeError(f"{where}: give side_files or tokenizer_source, not both")
    if source == "base":
        if recipe.base is None:
            raise MergeError(f"{where}: tokenizer_source is base, but there is no base_model")
        return recipe.base.label
    if source == "union":
        recipe.notes.append("tokenizer_source: union has no effect: parents must have one tokenizer")
        return None
    wanted = label or source
    if wanted is None:
        return None
    for parent in recipe.parents:
        if wanted == parent.label or os.path.abspath(wanted) == parent.place[0]:
            return parent.label
    known = ", ".join(parent.label for parent in recipe.parents)
    raise MergeError(f"{where}: side_files {wanted!r} is not one of the models {known}")


def _remarks(recipe: Recipe, raw: Mapping[str, Any]) -> None:
    """Note the defaults that take effect without appearing in the YAML."""
    sparse = "density" in PARAMETERS[recipe.method][0]
    unset = [m.parent.label for m in recipe.models if not (m.settings | recipe.settings).get("density")]
    if sparse and unset:
        what = "nothing is dropped" if recipe.method in DARE else "nothing is trimmed"
        recipe.notes.append(f"no density for {', '.join(unset)}: it is 1, {what}")
    if recipe.method in DARE and "random_seed" not in raw and unset != [m.parent.label for m in recipe.models]:
        recipe.notes.append("no random_seed: using 0")
    if recipe.method not in DARE and "random_seed" in raw:
        recipe.notes.append(f"random_seed has no effect: {recipe.method} makes no random choices")
