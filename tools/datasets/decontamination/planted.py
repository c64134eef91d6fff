"""Questions planted in documents in the ways they get into a corpus: verbatim, through OCR, with shuffled options."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

from tools.datasets.decontamination.overlap import BenchmarkQuestion

OCR_RATE = 0.05  # fraction of damaged characters
_LOOK_ALIKES = {"m": "rn", "w": "vv", "d": "cl", "h": "b", "e": "c", "o": "0", "l": "1", "i": "j", "s": "5", "fi": "ﬁ"}


def verbatim(question: BenchmarkQuestion, chance: random.Random) -> str:
    """The question and its lettered options, each on its own line."""
    return _laid_out(question, list(question.options))


def shuffled(question: BenchmarkQuestion, chance: random.Random) -> str:
    """The question with its lettered options in another order."""
    options = list(question.options)
    chance.shuffle(options)
    return _laid_out(question, options)


def scanned(question: BenchmarkQuestion, chance: random.Random) -> str:
    """The question after poor OCR: look-alikes, lost and doubled characters, words hyphenated at line ends."""
    out: list[str] = []
    column = 0
    for character in verbatim(question, chance):
        column = 0 if character == "\n" else column + 1
        if character.isalpha() and column > 60:
            out.append("-\n")
            column = 0
        if not character.isalnum() or chance.random() >= OCR_RATE:
            out.append(character)
            continue
        damage = chance.random()
        if damage < 0.6:
            out.append(_LOOK_ALIKES.get(character.lower(), chance.choice(string.ascii_lowercase)))
        elif damage < 0.8:
            out.append(character * 2)
    return "".join(out)


PLANTS: dict[str, Callable[[BenchmarkQuestion, random.Random], str]] = {
    "verbatim": verbatim,
    "OCR": scanned,
    "shuffled options": shuffled,
}


def plant(text: str, planted: str, chance: random.Random) -> str:
    """A document with a text inserted between two of its words."""
    spaces = [place for place, character in enumerate(text) if character == " "]
    place = chance.choice(spaces) if spaces else len(text)
    return f"{text[:place]}\n{planted}\n{text[place:]}"


def _laid_out(question: BenchmarkQuestion, options: list[str]) -> str:
    lettered = zip(string.ascii_uppercase, options, strict=False)
    return "\n".join([question.question, *(f"{letter}) {text}" for letter, text in lettered)])
