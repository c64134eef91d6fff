"""The minimum score of a contaminated document: chosen on one half of planted cases, evaluated on the other.

A case is a document of the corpus with a question planted in it, in each of the ways in `planted.py`; the unchanged
documents show the scores without one. Questions and documents are split in halves by a hash of their content. On the
first half, the threshold is the smallest score that at most `FALSE_POSITIVES` of the documents reach. A corpus that
does contain questions would raise it without limit, so it is capped at the score that all but `MISSED` of the scanned
plants reach. The reported figures come from the second half.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.evaluation.multiple_choice.statistics import wilson_interval
from tools.datasets.decontamination.overlap import QuestionIndex
from tools.datasets.decontamination.planted import PLANTS, plant

FALSE_POSITIVES = 0.001
MISSED = 0.05
LEAST = 0.3  # lower scores are ignored
_GRAIN = 1000  # thresholds are multiples of 1 / _GRAIN


@dataclass(frozen=True)
class Proportion:
    """`hits` of `cases`, with Wilson's 95 % interval."""

    hits: int
    cases: int

    @property
    def value(self) -> float:
        return self.hits / self.cases if self.cases else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.hits, self.cases) if self.cases else (0.0, 1.0)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.2%} of {self.cases:,} ({low:.2%} to {high:.2%})"


@dataclass(frozen=True)
class ChosenThreshold:
    """A threshold and its performance on cases that were not used to choose it."""

    value: float
    limited: bool  # capped by the plants: more documents score higher than chance allows
    recall: dict[str, Proportion]  # by way of planting
    reached: Proportion  # documents without a plant that reach it: false positives, or true finds


def choose_threshold(index: QuestionIndex, documents: Sequence[str], seed: int = 0) -> ChosenThreshold:
    """Choose the threshold on `documents`, a sample of the corpus: at least 2,000, so that each half can show one false
    positive in 1,000.
    """
    searchable = [n for n in range(len(index.questions)) if n not in set(index.unsearchable)]
    first = [n for n in searchable if _in_first_half(index.questions[n].name)]
    second = [n for n in searchable if n not in set(first)]
    halves = [d for d in documents if _in_first_half(d)], [d for d in documents if not _in_first_half(d)]
    chosen_on = [_best(index, document) for document in halves[0]]
    judged_on = [_best(index, document) for document in halves[1]]

    wanted = _quantile(chosen_on, 1 - FALSE_POSITIVES)
    cap = _quantile(_planted(index, first, halves[0], "OCR", seed), MISSED)
    value = min(wanted, cap)

    recall = {}
    for way in PLANTS:
        scores = _planted(index, second, halves[1], way, seed + 1)
        recall[way] = Proportion(sum(score >= value for score in scores), len(scores))
    reached = Proportion(sum(score >= value for score in judged_on), len(judged_on))
    return ChosenThreshold(value, wanted > cap, recall, reached)


def _in_first_half(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] < 128


def _best(index: QuestionIndex, document: str) -> float:
    found = index.find(document, LEAST)
    return found[0].score if found else 0.0


def _planted(
    index: QuestionIndex, numbers: Sequence[int], documents: Sequence[str], way: str, seed: int
) -> list[float]:
    """Scores of some questions, each in a document in which it was planted."""
    chance = random.Random(f"{seed} {way}")
    scores = []
    for number in numbers:
        question = index.questions[number]
        text = plant(chance.choice(documents) if documents else "", PLANTS[way](question, chance), chance)
        found = {overlap.question: overlap.score for overlap in index.find(text, LEAST)}
        scores.append(found.get(number, 0.0))
    return scores


def _quantile(scores: Sequence[float], share: float) -> float:
    """The smallest multiple of 1 / _GRAIN exceeded by at most 1 - `share` of the scores, but at least LEAST."""
    allowed = int(len(scores) * (1 - share) + 1e-9)
    ordered = sorted(scores, reverse=True)
    if allowed >= len(ordered):
        return LEAST
    return max(LEAST, (math.floor(ordered[allowed] * _GRAIN) + 1) / _GRAIN)
