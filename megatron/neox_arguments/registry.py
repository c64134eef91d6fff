"""Where the rules, warnings and derivations of the keys are registered, and what runs them.

Each file of `keys/` has one `Registry`, in which it enters what holds for its keys; `keys/all_keys.py` joins them in a
stated order. The order matters twice: derivations run in it, each seeing the values of those before, and problems are
reported in it.
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

Check = Callable[[Any], "str | None"]  # of the keys; the sentence to report, None if there is nothing to say


class Derived(NamedTuple):
    """What a derivation decides: values of keys, and lines that tell the user what was chosen and why."""

    values: dict[str, Any]
    notes: tuple[str, ...] = ()


Derivation = Callable[[Any, "int | None"], Derived]  # of the keys, and the number of ranks if a launcher knows it
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
    """Raised by keys without a valid value when they are read: what depends on them is not judged."""


def as_one_message(problems: list[str]) -> str:
    """All that is wrong: a sentence, or a list of them."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} things are wrong:\n" + "\n".join(f"  - {text}" for text in problems)


class Registry:
    """The rules, warnings and derivations of one group of keys, in the order in which its file states them.

    A function that reads keys of its own group only is typed with that group, one that crosses groups with `AllKeys`.
    """

    def __init__(self) -> None:
        self.derivations: list[Entry] = []
        self.rules: list[Entry] = []
        self.warnings: list[Entry] = []

    def derivation(self, *tasks: Task, fills: tuple[str, ...]) -> Callable[[D], D]:
        """Register a function that fills keys which the user left out, or rewrites them to their one meaning.

        It gives values for keys of `fills` only, and raises ConfigError where the keys contradict each other.
        """
        return _adder(self.derivations, tasks, fills)

    def rule(self, *tasks: Task) -> Callable[[C], C]:
        """Register what must hold: the function returns what is wrong in one sentence, or None."""
        return _adder(self.rules, tasks)

    def warning(self, *tasks: Task) -> Callable[[C], C]:
        """Register what is legal but may surprise: the function returns a line for the log, or None."""
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
        """The keys with every derived one filled, lines that say what was chosen, and what contradicts itself.

        Each derivation sees the values of those before it. `world_size` is the number of ranks that a launcher started,
        None if it is not known. `unsettle` marks the keys that a derivation could not fill; what reads one is left out.
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
                    raise TypeError(f"{entry.name} gives {', '.join(derived.values)}, it is to fill {entry.fills}")
                args = args.model_copy(update=derived.values)
                notes += derived.notes
        return args, notes, wrong

    def problems(self, args: Any, task: Task) -> list[str]:
        """What is wrong, one sentence per broken rule."""
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
