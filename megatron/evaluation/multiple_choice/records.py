"""The record of each item: one JSON line, sufficient to score it again or to compare two checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.common.atomic_files import write_text
from megatron.common.errors import UserError
from megatron.evaluation.multiple_choice.items import LETTERS, Item


@dataclass(frozen=True)
class Asked:
    """An item asked once, with one order of its options: `order[i]` is the index of the option shown at letter i.

    `choice` and `scores` refer to the item's options; `continuations`, `log_probs` and `alone` are in order of letters.
    """

    order: tuple[int, ...]
    choice: int | None
    prompt_ids: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...] = ()
    log_probs: tuple[tuple[float, ...], ...] = ()
    alone: tuple[float, ...] = ()  # log-probability of each text after an empty question
    scores: tuple[float, ...] = ()  # the scores that decided: log-probabilities, calibrated if so configured
    generated_ids: tuple[int, ...] = ()
    generated: str = ""
    parsed_by: str = ""  # json, regex or unparsed
    thinking: str = ""  # closed by the model, or cut by the budget
    ended: bool = True  # by an end token or stop text, not at a limit

    @property
    def sums(self) -> tuple[float, ...]:
        """Log-probability of each option's continuation, by letter."""
        return tuple(sum(one) for one in self.log_probs)


@dataclass(frozen=True)
class ItemResult:
    """An item, every time it was asked, and the resulting choice: None if no answer could be parsed."""

    item: Item
    asked: tuple[Asked, ...]
    choice: int | None

    @property
    def correct(self) -> bool:
        return self.item.answer is not None and self.choice == self.item.answer

    def to_json(self) -> str:
        item = self.item
        content: dict[str, Any] = {
            "id": item.number,
            "answer": item.answer,
            "choice": self.choice,
            "letter": None if self.choice is None else LETTERS[self.choice],
            "correct": None if item.answer is None else self.correct,
        }
        if item.topic is not None:
            content["topic"] = item.topic
        content["asked"] = [
            {name: value for name, value in asdict(one).items() if value not in ((), "") or name == "choice"}
            for one in self.asked
        ]
        return json.dumps(content, ensure_ascii=False)


def write_results(path: Path, results: Sequence[ItemResult]) -> None:
    """Write one line per item, in the order of the file of questions."""
    write_text(path, "".join(result.to_json() + "\n" for result in results))


def read_verdicts(path: Path) -> dict[int, bool]:
    """Read whether each item was answered correctly, by item number, from a file written by `write_results`."""
    verdicts: dict[int, bool] = {}
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line)
            item, correct = content["id"], content["correct"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: expected a line of the items.jsonl that mcq.py writes") from None
        if not isinstance(correct, bool):
            raise UserError(f"{path}, line {number}: its answers were withheld, so there is nothing to compare")
        verdicts[item] = correct
    return verdicts
