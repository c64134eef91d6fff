"""A merge as mergekit's YAML describes it, with a few keys of our own. Nothing here opens a model.

Keys beyond mergekit's: `random_seed` and `side_files` at the top; `label`, `license`, `hf_source`, `adapter`,
`adapter_base` and `base` beside a model; `rescale: probability`; `merge_method: average` with `checkpoints`, `steps`
or `last`. What is not known is an error, because a key without effect changes a model without a word.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from tools.convert_hf.formats.dtypes import ALIASES
from tools.merge.errors import MergeError
from tools.merge.parameters import Setting, depth, parse_number, parse_setting, resolve

DELTA_METHODS = ("task_arithmetic", "ties", "dare_linear", "dare_ties")
DARE = ("dare_linear", "dare_ties")
ELECTS_SIGN = ("ties", "dare_ties")
AVERAGE = "average"
# Parameters of each method: of the models, and of the whole.
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
_AVERAGE = {"merge_method", "checkpoints", "steps", "last", "parameters", "out_dtype", "hf_source", "name"}
_REFUSED = {
    "slices": "layers are not rearranged here; list whole models under `models`",
    "modules": "a Llama is one module; list whole models under `models`",
    "tokenizer": "parents must have one tokenizer; `side_files: LABEL` says whose files are used",
    "chat_template": "the template comes with the tokenizer's files: `side_files: LABEL` says whose",
}
_PARENT = {"model", "label", "license", "hf_source", "adapter", "adapter_base"}
_WEIGHTINGS = ("uniform", "linear", "ema")


@dataclass(frozen=True)
class ParentEntry:
    """A model that is read: where it is, what it is called, and what its files do not say."""

    path: Path
    label: str
    adapter: Path | None = None
    adapter_base: str | None = None
    hf_source: Path | None = None
    license: str | None = None

    @property
    def place(self) -> tuple[str, str]:
        return os.path.abspath(self.path), os.path.abspath(self.adapter) if self.adapter else ""


@dataclass(frozen=True)
class ModelEntry:
    """A model that takes part: its delta is to `base`, or to the recipe's base model if that is None."""

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
    """A merge. `models` are in the order of their labels, which is the order of all sums, whatever the YAML's."""

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
        """Every model that is read, once: the base, the models, and bases of their own."""
        found = [self.base, *(m.parent for m in self.models), *(m.base for m in self.models)]
        return list(dict.fromkeys(p for p in found if p is not None))

    def tensor_settings(self, tensor: str, num_layers: int) -> TensorSettings:
        """The numbers for one tensor; MergeError if one is missing or senseless."""
        at = depth(tensor, num_layers)
        weights, densities = [], []
        for model in self.models:
            where = f"{model.parent.label}, tensor {tensor}"
            scopes = (model.settings, self.settings)
            weight = resolve([s.get("weight") for s in scopes], tensor, at)
            if weight is None and self.method != "slerp":
                raise MergeError(f"{where}: no weight; give `parameters: {{weight: ...}}` beside the model")
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


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings may not repeat a key; the plain loader keeps the last of them without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_recipe(path: Path) -> Recipe:
    """The recipe of a YAML file; MergeError names the key that is wrong."""
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
    """Understand a recipe; MergeError names `where` and the key that is wrong."""
    raw = _mapping(raw, where)
    method = raw.get("merge_method")
    if method == AVERAGE:
        return _average(raw, where)
    if not isinstance(method, str) or method not in PARAMETERS:
        known = ", ".join((*PARAMETERS, AVERAGE))
        also = "; mergekit has it, this command does not" if method in _ELSEWHERE else ""
        raise MergeError(f"{where}: merge_method {method!r} is none of {known}{also}")
    for key, reason in _REFUSED.items():
        if key in raw:
            raise MergeError(f"{where}: {key} is not supported: {reason}")
    _refuse_unknown(raw, _TOP | _OURS, where)
    base = _parent(raw["base_model"], f"{where}: base_model") if raw.get("base_model") is not None else None
    entries = raw.get("models")
    if not isinstance(entries, list) or not entries:
        raise MergeError(f"{where}: models must be a list of the models to merge")
    models = [_model(entry, f"{where}: models[{i}]", method) for i, entry in enumerate(entries)]
    recipe = Recipe(method, _roles(models, base, method, where), base, name=_word(raw, "name", where))
    _whole_parameters(recipe, _mapping(raw.get("parameters") or {}, f"{where}: parameters"), where)
    recipe.seed = _seed(raw.get("random_seed", 0), where)
    _dtypes(recipe, raw, where)
    _check_labels(recipe, where)
    recipe.side_files = _side_files(recipe, raw, where)
    _remarks(recipe, raw)
    return recipe


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise MergeError(f"{where} must be a mapping of words to values, not {str(value)[:60]!r}")
    return value


def _refuse_unknown(raw: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    unknown = sorted(set(raw) - set(known))
    if unknown:
        raise MergeError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def _word(raw: Mapping[str, Any], key: str, where: str) -> str | None:
    value = raw.get(key)
    if value is not None and (not isinstance(value, str) or not value.strip() or not value.isprintable()):
        raise MergeError(f"{where}: {key} must be a line of text, not {str(value)[:60]!r}")
    return value


def _parent(value: Any, where: str) -> ParentEntry:
    """A model as a path, as `PATH+ADAPTER`, as mergekit's `{model: {path: ...}}`, or with our keys."""
    raw = {"model": value} if isinstance(value, str) else dict(_mapping(value, where))
    _refuse_unknown(raw, _PARENT, where)
    path, adapter = raw.get("model"), _word(raw, "adapter", where)
    if isinstance(path, Mapping) and isinstance(path.get("path"), str) and set(path) <= {"path", "revision"}:
        path = path["path"]
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise MergeError(f"{where}: model must be the path of a folder, not {str(path)[:60]!r}")
    if "+" in path and adapter is None and not Path(path).exists():
        path, _, adapter = path.partition("+")
    name = Path(os.path.abspath(path)).name
    label = _word(raw, "label", where) or (f"{name}+{Path(os.path.abspath(adapter)).name}" if adapter else name)
    source = _word(raw, "hf_source", where)
    return ParentEntry(
        path=Path(path),
        label=label,
        adapter=Path(adapter) if adapter else None,
        adapter_base=_word(raw, "adapter_base", where),
        hf_source=Path(source) if source else None,
        license=_word(raw, "license", where),
    )


def _model(raw: Any, where: str, method: str) -> ModelEntry:
    raw = _mapping({"model": raw} if isinstance(raw, str) else raw, where)
    _refuse_unknown(raw, _PARENT | {"parameters", "base"}, where)
    parent = _parent({key: value for key, value in raw.items() if key in _PARENT}, where)
    base = None
    if raw.get("base") is not None:
        if method not in DELTA_METHODS:
            raise MergeError(f"{where}: base has no meaning for {method}; only {', '.join(DELTA_METHODS)} use deltas")
        base = _parent(raw["base"], f"{where}: base")
    given = _mapping(raw.get("parameters") or {}, f"{where}: parameters")
    allowed = PARAMETERS[method][0]
    settings = {}
    for key, value in given.items():
        if key not in allowed:
            known = ", ".join(sorted(allowed)) or "none"
            raise MergeError(f"{where}: {key} is not a parameter of a model in {method}; known: {known}")
        settings[key] = parse_setting(value, f"{where}: {key}")
    return ModelEntry(parent, settings, base)


def _roles(models: list[ModelEntry], base: ParentEntry | None, method: str, where: str) -> list[ModelEntry]:
    """The models that take part beside the base, by label. mergekit lets the base stand in the list as well."""
    if method == "linear":
        if base is not None:
            raise MergeError(f"{where}: base_model has no part in linear; list it under models, or leave it out")
        return sorted(models, key=lambda m: m.parent.label)
    if base is None:
        raise MergeError(f"{where}: {method} needs base_model, the model that deltas are taken from")
    for model in models:
        if model.parent.place == base.place and model.settings:
            raise MergeError(
                f"{where}: {model.parent.label} is base_model: its delta is zero, parameters have no effect on it"
            )
    others = [model for model in models if model.parent.place != base.place]
    if method == "slerp" and len(others) != 1:
        raise MergeError(f"{where}: slerp merges base_model and one other model, {len(others)} others are given")
    if not others:
        raise MergeError(f"{where}: there is no model beside base_model")
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
        recipe.notes.append("int8_mask has no effect: no mask of signs is kept in memory")
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


def _dtypes(recipe: Recipe, raw: Mapping[str, Any], where: str) -> None:
    for key in ("dtype", "out_dtype"):
        value = raw.get(key)
        if value is not None and (not isinstance(value, str) or value not in ALIASES):
            raise MergeError(f"{where}: {key} must be one of {', '.join(ALIASES)}, not {str(value)[:60]!r}")
    given = raw.get("out_dtype") or raw.get("dtype")
    recipe.out_dtype = ALIASES[given] if given else None
    if raw.get("dtype") and ALIASES[raw["dtype"]] != "float32":
        recipe.notes.append(f"dtype {raw['dtype']} is the output's type; the arithmetic is fp32 with one rounding")


def _check_labels(recipe: Recipe, where: str) -> None:
    places: dict[str, ParentEntry] = {}
    for parent in recipe.parents:
        other = places.setdefault(parent.label, parent)
        if other.place != parent.place:
            raise MergeError(
                f"{where}: {other.path} and {parent.path} are both called {parent.label!r}; give one a `label` of its "
                f"own (masks and the model card use it)"
            )
        if other != parent:
            raise MergeError(f"{where}: {parent.label!r} is described twice, with different keys; describe it once")
    labels = [model.parent.label for model in recipe.models]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise MergeError(f"{where}: {', '.join(twice)} stands twice among the models")
    for model in recipe.models:
        if model.base is not None and model.base.place == model.parent.place:
            raise MergeError(f"{where}: {model.parent.label} is its own base; its delta would be zero")


def _side_files(recipe: Recipe, raw: Mapping[str, Any], where: str) -> str | None:
    label = _word(raw, "side_files", where)
    source = _word(raw, "tokenizer_source", where)
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
    raise MergeError(f"{where}: side_files {wanted!r} is none of the models; known are {known}")


def _remarks(recipe: Recipe, raw: Mapping[str, Any]) -> None:
    """What has an effect that the YAML does not show."""
    sparse = "density" in PARAMETERS[recipe.method][0]
    unset = [m.parent.label for m in recipe.models if not (m.settings | recipe.settings).get("density")]
    if sparse and unset:
        what = "nothing is dropped" if recipe.method in DARE else "nothing is trimmed"
        recipe.notes.append(f"no density for {', '.join(unset)}: it is 1, {what}")
    if recipe.method in DARE and "random_seed" not in raw and unset != [m.parent.label for m in recipe.models]:
        recipe.notes.append("no random_seed: it is 0")
    if recipe.method not in DARE and "random_seed" in raw:
        recipe.notes.append(f"random_seed has no effect: {recipe.method} draws nothing")


def _average(raw: Mapping[str, Any], where: str) -> Recipe:
    """Checkpoints of one run, as a linear merge with weights by age."""
    _refuse_unknown(raw, _AVERAGE, where)
    folder = _word(raw, "checkpoints", where)
    if folder is None:
        raise MergeError(f"{where}: average needs checkpoints, the folder that holds global_step* folders")
    root = Path(folder)
    if not root.is_dir():
        raise MergeError(f"{where}: checkpoints {folder} is not a folder")
    found = sorted(int(m[1]) for m in (re.fullmatch(r"global_step(\d+)", p.name) for p in root.iterdir()) if m)
    steps = _steps(raw, found, where)
    weights = _weighting(_mapping(raw.get("parameters") or {}, f"{where}: parameters"), len(steps), where)
    source = _word(raw, "hf_source", where)
    models = []
    for step, weight in zip(steps, weights, strict=True):
        parent = ParentEntry(root / f"global_step{step}", f"global_step{step}")
        models.append(ModelEntry(replace(parent, hf_source=Path(source) if source else None), _only("weight", weight)))
    recipe = Recipe("linear", models, None, normalize=True, name=_word(raw, "name", where))
    recipe.side_files = models[-1].parent.label
    recipe.models.sort(key=lambda m: m.parent.label)
    _dtypes(recipe, raw, where)
    recipe.notes.append(f"average of {len(steps)} checkpoints: steps {', '.join(map(str, steps))}")
    return recipe


def _only(name: str, value: float) -> dict[str, Setting]:
    return {name: parse_setting(value, name)}


def _steps(raw: Mapping[str, Any], found: list[int], where: str) -> list[int]:
    steps, last = raw.get("steps"), raw.get("last")
    whole: Callable[[Any], bool] = lambda n: isinstance(n, int) and not isinstance(n, bool)  # noqa: E731
    if (steps is None) == (last is None):
        raise MergeError(f"{where}: average needs either steps, a list of iterations, or last, a number of checkpoints")
    if last is not None:
        if not whole(last) or not 2 <= last <= len(found):
            raise MergeError(
                f"{where}: last is {last!r}; at least 2 are averaged, and {len(found)} checkpoints are there"
            )
        return found[-last:]
    if not isinstance(steps, list) or len(steps) < 2 or not all(map(whole, steps)) or len(set(steps)) < len(steps):
        raise MergeError(f"{where}: steps must be a list of at least two different iterations, not {str(steps)[:60]!r}")
    missing = sorted(set(steps) - set(found))
    if missing:
        raise MergeError(f"{where}: there is no checkpoint of step {', '.join(map(str, missing))}; found: {found}")
    return sorted(steps)


def _weighting(given: Mapping[str, Any], count: int, where: str) -> list[float]:
    """Weights from the oldest checkpoint to the newest; only their ratios matter."""
    _refuse_unknown(given, ("weighting", "decay"), f"{where}: parameters")
    kind = given.get("weighting", "uniform")
    if kind not in _WEIGHTINGS:
        raise MergeError(f"{where}: weighting must be one of {', '.join(_WEIGHTINGS)}, not {str(kind)[:60]!r}")
    if kind != "ema":
        if "decay" in given:
            raise MergeError(f"{where}: decay belongs to weighting ema, not to {kind}")
        return [1.0 if kind == "uniform" else float(i + 1) for i in range(count)]
    decay = parse_number(given.get("decay"), f"{where}: decay")
    if not 0 < decay < 1:
        raise MergeError(f"{where}: decay is {decay:g}; it must be between 0 and 1")
    return [decay ** (count - 1 - i) for i in range(count)]
