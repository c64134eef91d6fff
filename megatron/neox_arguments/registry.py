"""Registration and evaluation of the rules, warnings and derivations of the keys.

Each file in `keys/` has one `Registry`, in which it registers those of its keys; `keys/all_keys.py` joins them in a
fixed order. The order matters twice: derivations run in it, each seeing the values of the previous ones, and problems
are reported in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel

from megatron.common.errors import ConfigError

Task = Literal["train", "eval", "generate", "mcq", "embed", "model"]
ALL_TASKS: tuple[Task, ...] = ("train", "eval", "generate", "mcq", "embed", "model")

Check = Callable[[Any], "str | None"]  # takes the keys; returns the message, None if there is nothing to report


class Derived(NamedTuple):
    """What a derivation decides: values of keys, and lines that tell the user what was chosen and why."""

    values: dict[str, Any]
    notes: tuple[str, ...] = ()


Derivation = Callable[[Any, "int | None"], Derived]  # takes the keys, and the number of ranks if a launcher knows it
C = TypeVar("C", bound=Check)
D = TypeVar("D", bound=Derivation)
K = TypeVar("K", bound=BaseModel)


@dataclass(frozen=True)
class Entry:
    """A registered function and the tasks for which it runs."""

    tasks: tuple[Task, ...]
    function: Callable[..., Any]
    fills: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.function.__name__


class UnsettledError(Exception):
    """Raised when a key without a valid value is read: whatever depends on it is not checked."""


def as_one_message(problems: list[str]) -> str:
    """All problems: a single message, or a list of them."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} things are wrong:\n" + "\n".join(f"  - {text}" for text in problems)


class Registry:
    """The rules, warnings and derivations of one group of keys, in the order of its file.

    A function that reads keys of its own group only is typed with that group, one that crosses groups with `AllKeys`.
    """

    def __init__(self) -> None:
        self.derivations: list[Entry] = []
        self.rules: list[Entry] = []
        self.warnings: list[Entry] = []

    def derivation(self, *tasks: Task, fills: tuple[str, ...]) -> Callable[[D], D]:
        """Register a function that fills keys which the user left out, or rewrites them to a canonical value.

        It returns values only for keys in `fills`, and raises ConfigError where the keys contradict each other.
        """
        return _adder(self.derivations, tasks, fills)

    def rule(self, *tasks: Task) -> Callable[[C], C]:
        """Register a rule: the function returns the problem in one sentence, or None."""
        return _adder(self.rules, tasks)

    def warning(self, *tasks: Task) -> Callable[[C], C]:
        """Register a warning about something legal but surprising: the function returns a line for the log, or None."""
        return _adder(self.warnings, tasks)

    @classmethod
    def joined(cls, parts: Iterable[Registry]) -> Registry:
        """One registry with the entries of all parts, part after part."""
        whole = cls()
        for part in parts:
            whole.derivations += part.derivations
            whole.rules += part.rules
            whole.warnings += part.warnings
        return whole

    def derive(
        self, args: K, task: Task, world_size: int | None, unsettle: Callable[[K, Iterable[str]], K]
    ) -> tuple[K, list[str], list[str]]:
        """The keys with every derived one filled, notes on what was chosen, and contradictions.

        Each derivation sees the values of those before it. `world_size` is the number of ranks that a launcher started,
        None if it is not known. `unsettle` marks the keys that a derivation could not fill; derivations that read one
        are skipped.
        """
        notes: list[str] = []
        wrong: list[str] = []
        for entry in self.derivations:
            if task not in entry.tasks:
                continue
            try:
                derived: Derived = entry.function(args, world_size)
            except ConfigError as error:
                wrong.append(str(error))
                args = unsettle(args, entry.fills)
            except UnsettledError:
                args = unsettle(args, entry.fills)
            else:
                if not set(derived.values) <= set(entry.fills):
                    raise TypeError(f"{entry.name} gives {', '.join(derived.values)}, but may only fill {entry.fills}")
                args = args.model_copy(update=derived.values)
                notes += derived.notes
        return args, notes, wrong

    def problems(self, args: Any, task: Task) -> list[str]:
        """One message per broken rule."""
        return _texts(self.rules, args, task)

    def surprises(self, args: Any, task: Task) -> list[str]:
        """The lines of all warnings that apply."""
        return _texts(self.warnings, args, task)


def _adder(entries: list[Entry], tasks: tuple[Task, ...], fills: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    def add(function: Any) -> Any:
        entries.append(Entry(tasks, function, fills))
        return function

    return add


def _texts(entries: list[Entry], args: Any, task: Task) -> list[str]:
    texts = []
    for entry in entries:
        if task not in entry.tasks:
            continue
        with contextlib.suppress(UnsettledError):
            if text := entry.function(args):
                texts.append(text)
    return texts
