"""The options that go with `--dry-run` on deepy.py's command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.neox_arguments import ConfigError

FLAGS = {"--json": "json", "--allow-memory": "allow_memory", "--search": "search"}
VALUES = {
    "--machine": "machine",
    "--usable-gib": "usable_gib",
    "--token-budget": "token_budget",
    "--picture": "picture",
}


@dataclass(frozen=True)
class PlanOptions:
    json: bool = False
    allow_memory: bool = False  # a plan that does not fit is not an error
    search: bool = False
    machine: str = "frontier"
    usable_gib: float | None = None  # of a GCD's memory, default the machine's
    token_budget: float | None = None
    picture: Path | None = None  # .png, .svg or .pdf


def take_options(words: list[str]) -> PlanOptions:
    """Remove the plan's options from `words` and return them; raises ConfigError."""
    taken: dict[str, Any] = {}
    rest: list[str] = []
    while words:
        word, equals, value = words.pop(0).partition("=")
        name = word.replace("_", "-")
        if name in FLAGS and not equals:
            taken[FLAGS[name]] = True
        elif name in VALUES:
            if not equals and not words:
                raise ConfigError(f"{word} needs a value")
            taken[VALUES[name]] = value if equals else words.pop(0)
        else:
            rest.append(word + equals + value)
    words.extend(rest)
    return PlanOptions(**(taken | _converted(taken)))


def _converted(taken: dict[str, Any]) -> dict[str, Any]:
    converted: dict[str, Any] = {}
    for option in ("usable_gib", "token_budget"):
        if option in taken:
            try:
                converted[option] = float(taken[option])
            except ValueError:
                converted[option] = -1.0
            if not converted[option] > 0:
                name = next(name for name, field in VALUES.items() if field == option)
                raise ConfigError(f"{name}: {taken[option]!r} is not a positive number, such as 57 or 165e9")
    if "picture" in taken:
        converted["picture"] = Path(taken["picture"])
    return converted
