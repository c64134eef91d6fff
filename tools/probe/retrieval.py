"""Do the halves of a document find each other? Recall and AUC of raw and mean-centered cosine similarities.

A language model's vectors share a large common component: random texts look alike, and raw cosines mainly measure how
large it is. Subtracting the mean of all vectors leaves what distinguishes the texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.evaluation.multiple_choice.statistics import PairedComparison, compare_paired, wilson_interval
from tools.probe.errors import ProbeError
from tools.probe.features import Features
from tools.probe.halves import FIRST, SECOND

BINS = np.linspace(-1, 1, 101)
_ROWS = 512  # of the similarity matrix, computed at a time
_TIE = 1e-9  # cosines of equal vectors differ by rounding
VIEWS = ("raw", "centered")


@dataclass(frozen=True)
class Similarities:
    """First halves compared with second halves: which ones find each other, AUC, histograms of cosines over BINS."""

    hits: np.ndarray  # bool [documents]: the first half is nearest to its own second half
    hits_back: np.ndarray  # from second to first halves
    auc: float
    mean_same: float
    mean_different: float
    same_counts: np.ndarray
    different_counts: np.ndarray

    def facts(self) -> dict[str, Any]:
        n = len(self.hits)
        return {
            "recall_at_1": float(self.hits.mean()),
            "recall_at_1_wilson_95": list(wilson_interval(int(self.hits.sum()), n)),
            "recall_at_1_back": float(self.hits_back.mean()),
            "auc": self.auc,
            "mean_cosine_same": self.mean_same,
            "mean_cosine_different": self.mean_different,
            "histogram_same": self.same_counts.tolist(),
            "histogram_different": self.different_counts.tolist(),
        }


def compare_halves(first: np.ndarray, second: np.ndarray, *, centered: bool) -> Similarities:
    """Compare all first halves [documents, h] with all second halves by cosine, `_ROWS` first halves at a time.

    AUC is the share of (same, different) pairs of similarities in the right order, ties counting half (Mann-Whitney).
    A half is found if it is nearer than all others: a tie is a miss.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if centered:
        mean = (first.mean(0) + second.mean(0)) / 2
        first, second = first - mean, second - mean
    first, second = _units(first), _units(second)
    n = len(first)
    same = np.einsum("ij,ij->i", first, second)
    ordered = np.sort(same)
    best_forward, best_back = np.full(n, -np.inf), np.full(n, -np.inf)  # cosine of the nearest wrong half
    counts, total, below = np.zeros(len(BINS) - 1, dtype=np.int64), 0.0, 0.0
    for start in range(0, n, _ROWS):
        part = first[start : start + _ROWS] @ second.T
        rows = np.arange(len(part))
        part[rows, start + rows] = -np.inf
        best_forward[start : start + _ROWS] = part.max(1)
        np.maximum(best_back, part.max(0), out=best_back)
        different = part[np.isfinite(part)]
        # Pairs in the wrong order: for each different similarity, the same ones below it, and half of the equal ones.
        below += float((np.searchsorted(ordered, different) + np.searchsorted(ordered, different, "right")).sum()) / 2
        counts += np.histogram(np.clip(different, -1, 1), BINS)[0]
        total += float(different.sum())
    pairs = n * (n - 1)
    return Similarities(
        hits=same > best_forward + _TIE,
        hits_back=same > best_back + _TIE,
        auc=1 - below / (n * pairs),
        mean_same=float(same.mean()),
        mean_different=total / pairs,
        same_counts=np.histogram(np.clip(same, -1, 1), BINS)[0],
        different_counts=counts,
    )


def _units(vectors: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


def documents_of(features: Features) -> list[str]:
    """Ids of the documents, in the file's order. Raises ProbeError if one lacks a half."""
    halves = set(features.ids)
    names = [one.removesuffix(FIRST) for one in features.ids if one.endswith(FIRST)]
    alone = [name for name in names if f"{name}{SECOND}" not in halves]
    if alone or 2 * len(names) != len(features.ids) or len(names) < 2:
        example = f", {alone[0]}{SECOND} is missing" if alone else ""
        raise ProbeError(
            f"{features.path}: expected ids ending in {FIRST} and {SECOND} for at least 2 documents{example}; "
            f"`python -m tools.probe halves` writes such texts"
        )
    return names


def retrieval_report(models: Mapping[str, Features], sample: int, seed: int = 0) -> dict[str, Any]:
    """Recall, AUC and histograms of every model and layer, on at most `sample` documents drawn at random.

    Each later model is compared with the first, both at their last layer, by an exact McNemar test on the documents
    found. Raises ProbeError if the models' vectors are not of the same documents.
    """
    (first_name, first), *others = models.items()
    names = documents_of(first)
    for label, features in others:
        if set(features.ids) != set(first.ids):
            raise ProbeError(f"{features.path} ({label}) and {first.path} ({first_name}) have different ids")
    there = len(names)
    if there > sample:
        chosen = np.sort(np.random.default_rng(seed).choice(there, sample, replace=False))
        names = [names[place] for place in chosen]
    report: dict[str, Any] = {
        "documents": len(names),
        "documents_there": there,
        "chance_recall_at_1": 1 / len(names),
        "bins": BINS.tolist(),
        "models": {},
    }
    hits: dict[tuple[str, str], Sequence[bool]] = {}
    for label, features in models.items():
        rows = [features.rows_of([name + suffix for name in names]) for suffix in (FIRST, SECOND)]
        layers: dict[str, Any] = {}
        for layer in features.layers:
            found = {
                view: compare_halves(*(features.layer(layer, part) for part in rows), centered=view == "centered")
                for view in VIEWS
            }
            layers[str(layer)] = {view: one.facts() for view, one in found.items()}
            hits |= {(label, view): one.hits.tolist() for view, one in found.items()}  # keeps the last layer's
        report["models"][label] = {"file": str(features.path), "layers": layers}
        if label != first_name:
            report["models"][label]["against_" + first_name] = {
                view: _comparison(compare_paired(hits[first_name, view], hits[label, view])) for view in VIEWS
            }
    return report


def _comparison(found: PairedComparison) -> dict[str, Any]:
    return {
        "found_before": found.before,
        "found_now": found.after,
        "gained": found.gained,
        "lost": found.lost,
        "mcnemar_exact_p": found.p_value,
    }


def lines_of_retrieval(report: Mapping[str, Any]) -> list[str]:
    """The table that the command prints."""
    lines = [
        f"{report['documents']} documents, first against second halves; recall@1 by chance: "
        f"{100 * report['chance_recall_at_1']:.2g} %",
        f"{'model':16} {'layer':>5} {'cosines':8} {'recall@1':>9} {'95 %':>14} {'back':>7} {'AUC':>7} "
        f"{'same':>6} {'different':>9}",
    ]
    for label, model in report["models"].items():
        for layer, views in model["layers"].items():
            for view, one in views.items():
                low, high = one["recall_at_1_wilson_95"]
                lines.append(
                    f"{label:16} {layer:>5} {view:8} {100 * one['recall_at_1']:7.1f} % {100 * low:6.1f} to "
                    f"{100 * high:4.1f} {100 * one['recall_at_1_back']:5.1f} % {one['auc']:7.4f} "
                    f"{one['mean_cosine_same']:6.3f} {one['mean_cosine_different']:9.3f}"
                )
        for name, views in model.items():
            if name.startswith("against_"):
                one = views["centered"]
                lines.append(
                    f"  {label} {name.replace('_', ' ')}, centered: {one['gained']} documents gained, {one['lost']} "
                    f"lost, exact McNemar p = {one['mcnemar_exact_p']:.3g}"
                )
    return lines
