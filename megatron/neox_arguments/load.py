"""Reading and merging YAML files and command-line overrides, with the location of each key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron.common.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2 numbers and no duplicate keys.

    YAML 1.1, which PyYAML follows, reads `1e-5` as text, `010` as eight, `1:30` as ninety and `2026-01-01` as a date.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if name in lines:
                raise ConfigError(
                    f"{key_node.start_mark.name}: {name} is given twice, on lines {lines[name]} and {line}; delete one"
                )
            lines[name] = line
        return super().construct_mapping(node, deep)


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_DIGITS = list("-+0123456789")
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), _DIGITS)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^([-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    [*_DIGITS, "."],
)


# PyYAML's own errors, and those that its constructors let through: numbers of thousands of digits, tags that do not fit
# their value, keys that are lists, infinite nesting.
_NOT_YAML = (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError)


def _said(error: BaseException) -> str:
    return str(error) if isinstance(error, yaml.YAMLError) else f"{type(error).__name__}: {error}"


def canonical(name: str) -> str:
    """A key with underscores: `vocab-file` and `vocab_file` are the same key."""
    return name.replace("-", "_")


def parse_value(text: str) -> Any:
    """A command-line value, read as YAML: `1e-5`, `true`, `[1, 2]`, `{type: Adam}`, plain text."""
    return yaml.load(text, Loader=_Loader)


def resolve_path(name: str | Path, folder: str | Path | None = None) -> Path:
    """`configs/tiny/model` means `configs/tiny/model.yml`; `folder` is put in front (deepy's -d)."""
    path = Path(folder, name) if folder else Path(name)
    if path.is_dir() or not path.name:
        raise ConfigError(f"{path} is a folder; give the YAML files in it, or -d {path} and their names")
    return path if path.suffix in (".yml", ".yaml", ".json") else path.with_name(path.name + ".yml")


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Keys of one file and the location of each (`file:line`)."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{path}: cannot be read ({why}); give the path of a YAML file") from None
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    loader.name = str(path)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}, {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}: expected `key: value` lines, found something else")
        raw = loader.construct_document(node)
    except ConfigError:
        raise
    except _NOT_YAML as error:
        raise ConfigError(f"{path}: not valid YAML: {_said(error)}") from None
    finally:
        loader.dispose()
    where = {str(key_node.value): f"{path}:{key_node.start_mark.line + 1}" for key_node, _ in node.value}
    keys: dict[str, Any] = {}
    places: dict[str, str] = {}
    for spelled, value in raw.items():
        name = canonical(str(spelled))
        place = where.get(str(spelled), str(path))
        if name in keys:
            raise ConfigError(f"{name} is given twice: {places[name]} and {place} ({spelled}); delete one")
        keys[name], places[name] = value, place
    return keys, places


def merge_files(paths: Iterable[str | Path]) -> tuple[dict[str, Any], dict[str, str]]:
    """All keys of all files; a key in two files is an error, because it is unclear which value is meant."""
    merged: dict[str, Any] = {}
    places: dict[str, str] = {}
    for path in paths:
        keys, where = read_yaml(resolve_path(path))
        for name, value in keys.items():
            if name in merged:
                raise ConfigError(f"{name} is given twice: {places[name]} and {where[name]}; delete one")
            merged[name], places[name] = value, where[name]
    return merged, places


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--key value`, `--key=value` or a bare `--flag` (true) from the command line; `--optimizer.params.lr 1e-5`."""
    overrides: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not re.match(r"^--[A-Za-z]", word):
            raise ConfigError(f"{word}: expected `--key value` here (files come before the first --key)")
        name, equals, text = word[2:].partition("=")
        if not equals:
            text = rest.pop(0) if rest and not re.match(r"^--[A-Za-z]", rest[0]) else "true"
        name = ".".join([canonical(part) for part in name.split(".")])
        if name in overrides:
            raise ConfigError(f"--{name} is given twice on the command line; delete one")
        try:
            overrides[name] = parse_value(text)
        except ConfigError:
            raise
        except _NOT_YAML as error:
            raise ConfigError(f"--{name} {text}: not a valid value: {_said(error)}") from None
    return overrides


def apply_overrides(keys: dict[str, Any], places: dict[str, str], overrides: dict[str, Any]) -> None:
    """Set overrides in place, after merging; a dotted name reaches into a mapping and leaves its other keys."""
    for name, value in overrides.items():
        *parents, last = [canonical(part) for part in name.split(".")]
        target = keys
        for depth, parent in enumerate(parents):
            inner = target.get(parent) or {}
            if not isinstance(inner, dict):
                raise ConfigError(f"--{name}: {'.'.join(parents[: depth + 1])} is {inner!r}, not a mapping")
            target[parent] = dict(inner)  # a copy: the caller's nested mappings must not change
            target = target[parent]
        target[last] = value
        places[(parents or [last])[0]] = f"--{name}"
