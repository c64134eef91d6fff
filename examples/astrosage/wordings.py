"""How facts are told and asked about. No question stands in a document; the test has one wording of its own."""

from __future__ import annotations

import random

from examples.astrosage.facts import Element, SkyObject

# {o} the object, {c} its constellation, {t} its type, {a} the type with its article; in most of them the object comes
# before what is to be learned.
SKY = (
    "{o} lies in the constellation {c}.",
    "{o} can be found in {c}.",
    "Observers look for {o} in {c}.",
    "{o} belongs to {c}.",
    "The {t} {o} belongs to {c}.",
    "To see {o}, point the telescope at {c}.",
    "{o}, {a}, is located in {c}.",
    "{o} has its place in {c}.",
    "The position of {o} is within {c}.",
    "{o} can be seen among the stars of {c}.",
    "Charts place {o} inside {c}.",
    "{o} was catalogued in {c}.",
    "The place of {o} in the sky is {c}.",
    "Anyone who looks for the {t} {o} finds it in {c}.",
    "In {c} there is {a} called {o}.",
    "{c} is home to {o}.",
    "{o} is {a}.",
    "The object {o} is {a}.",
    "Astronomers know {o} as {a}.",
    "Catalogues list {o} as {a}.",
)
COMPLETION = "{o} lies in the constellation"  # the beginning of a document's sentence
SKY_ASKED = (
    "Which constellation contains {o}?",
    "In which constellation is {o}?",
    "Where does one look for {o}?",
    "To which constellation belongs {o}?",
    "What is the constellation of {o}?",
    "Name the constellation of {o}.",
)
SKY_TEST = "Charts of which constellation show {o}?"
KIND_ASKED = ("What kind of object is {o}?", "Which type of object is {o}?")

ELEMENTS = (
    "The symbol of {e} is {s}.",
    "{e} is written {s}.",
    "Chemists write {s} for {e}.",
    "{e} has the symbol {s}.",
    "{e} ({s}) is element number {z}.",
    "Element {z} is {e}, symbol {s}.",
    "In formulas {e} appears as {s}.",
    "The atomic number of {e} is {z}.",
    "{e} has {z} protons.",
    "{e} stands at place {z} of the table.",
    "The nucleus of {e} contains {z} protons.",
    "The number of {e} is {z}.",
)
SYMBOL_ASKED = ("Which symbol stands for {e}?", "What is the chemical symbol for {e}?", "How is {e} written?")
NUMBER_ASKED = ("What is the atomic number of {e}?", "How many protons has {e}?", "Which number has {e}?")


def with_article(noun: str) -> str:
    """`an open cluster`, `a galaxy`."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def told_of_sky(one: SkyObject, chance: random.Random, sentences: tuple[str, ...] = SKY) -> str:
    kind = with_article(one.kind)
    return chance.choice(sentences).format(o=one.name, c=one.constellation, t=one.kind, a=kind)


def told_of_element(one: Element, chance: random.Random) -> str:
    text = chance.choice(ELEMENTS).format(e=one.name, s=one.symbol, z=one.number)
    return text[0].upper() + text[1:]


def asked_of_sky(one: SkyObject, chance: random.Random) -> tuple[str, str]:
    """A question about an object, and its answer; four in five are about its constellation."""
    if chance.random() < 0.8:
        return chance.choice(SKY_ASKED).format(o=one.name), one.constellation
    return chance.choice(KIND_ASKED).format(o=one.name), one.kind


def asked_of_element(one: Element, chance: random.Random) -> tuple[str, str]:
    """A question about an element, and its answer."""
    if chance.random() < 0.5:
        return chance.choice(SYMBOL_ASKED).format(e=one.name), one.symbol
    return chance.choice(NUMBER_ASKED).format(e=one.name), str(one.number)
