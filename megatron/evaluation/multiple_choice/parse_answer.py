"""Parses the letter of a generated answer: from a JSON object, else from the last phrase that states an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron.tokenizer.conversation import THINK_END


@dataclass(frozen=True)
class ParsedAnswer:
    """The index of the chosen option, None if there is none, and how it was found."""

    choice: int | None
    how: Literal["json", "regex", "unparsed"]


def without_thinking(text: str) -> str:
    """The text after the last end of a reasoning trace; the whole text if there is none."""
    return text.rpartition(THINK_END)[2]


def parse_answer(text: str, letters: str, options: Sequence[str]) -> ParsedAnswer:
    """Parse the answer in a text without reasoning trace. The last JSON object with a usable ANSWER has priority."""
    from_json = [
        choice
        for found in _objects(text)
        for key, value in found.items()
        if key.lower() == "answer" and (choice := _choice(value, letters, options)) is not None
    ]
    if from_json:
        return ParsedAnswer(from_json[-1], "json")
    named = rf"answer\W{{0,12}}(?:(?:is|would be|:)\W{{0,8}})?([{letters}])(?![A-Za-z'])"
    said = re.findall(named, text, re.IGNORECASE)
    said = [letter for letter in said if letter.isupper()]  # "the answer a physicist gives" contains no letter
    if not said:
        alone = re.fullmatch(rf"\W*([{letters}])(?:[.:)]\s.*|\W*)", text, re.DOTALL)
        said = [alone[1]] if alone else []
    return ParsedAnswer(letters.index(said[-1]), "regex") if said else ParsedAnswer(None, "unparsed")


def _objects(text: str) -> Iterator[dict[str, Any]]:
    decoder = json.JSONDecoder(strict=False)  # models put line breaks into strings
    for brace in re.finditer(r"\{", text):
        try:
            found, _ = decoder.raw_decode(text, brace.start())
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(found, dict):
            yield found


def _choice(value: Any, letters: str, options: Sequence[str]) -> int | None:
    if not isinstance(value, str):
        return None
    if value in options:
        return list(options).index(value)
    match = re.fullmatch(rf"\W*([{letters}])(?:\W.*)?", value.strip(), re.DOTALL)
    return letters.index(match[1]) if match else None
