"""`~` and `$VARIABLES` in paths: a YAML file has no shell that would expand them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

PATH_KEYS = (
    "load",
    "save",
    "lora",
    "vocab_file",
    "merge_file",
    "data_path",
    "train_data_paths",
    "valid_data_paths",
    "test_data_paths",
    "train_label_data_paths",
    "valid_label_data_paths",
    "test_label_data_paths",
    "log_dir",
    "tensorboard_dir",
    "sample_input_file",
    "sample_output_file",
    "eval_results_prefix",
    "chat_template",  # or a built-in name, which contains neither
    "eval_task_path",
    "eval_documents",
    "mcq",
    "embed",
    "completion",
)
# in a data source, lora, mcq, embed, completion
_PATHS_WITHIN = ("path", "load", "items", "input", "output", "shots_file", "compare_with")
_VARIABLE = re.compile(r"\$(?:\$|(\w+)|\{(\w+)\})")


class UnsetVariable(Exception):
    """A path contains an environment variable that is not set. The message is its name."""


def expand_path(text: str, env: Mapping[str, str] = os.environ) -> str:
    """Expand `~/x` and `~name/x` to home folders, `$NAME` and `${NAME}` from the environment, `$$` to `$`.

    Raises UnsetVariable.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name is None:
            return "$"
        if name not in env:
            raise UnsetVariable(name)
        return env[name]

    return os.path.expanduser(_VARIABLE.sub(value, text))


def expand_paths(keys: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`keys` with all their paths expanded, and a message for each path that cannot be."""
    expanded, problems = dict(keys), []
    for name in PATH_KEYS:
        if name not in keys:
            continue
        try:
            expanded[name] = _expanded(keys[name])
        except UnsetVariable as unset:
            problems.append(
                f"{name}: {keys[name]!r} contains the variable {unset}, which is not set here: export {unset}, or "
                f"write $$ for a dollar sign"
            )
    return expanded, problems


def _expanded(value: Any) -> Any:
    """A path, a list of them, or a mapping that holds some; anything else as it is."""
    if isinstance(value, str):
        return expand_path(value)
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    if isinstance(value, dict):
        found = {name: value[name] for name in _PATHS_WITHIN if isinstance(value.get(name), str)}
        return {**value, **{name: expand_path(path) for name, path in found.items()}}
    return value
