"""A study: every property probed in every layer of a trained model; the untrained model and the inputs are baselines.

Items are divided into a fit set and a test set by a hash of their ids, the same for all properties and models. On the
fit set every layer is cross-validated and the best one is chosen; the test set is used once, for that layer. The
layer or the number of components of a baseline is chosen in the same way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from tools.probe.errors import ProbeError
from tools.probe.features import Features
from tools.probe.inputs import COMPONENTS, RawInputs
from tools.probe.labels import Property
from tools.probe.linear import bootstrap_scores, cross_validate, predict, score

SMALLEST_FIT, SMALLEST_TEST = 30, 20
TRAINED, UNTRAINED, INPUTS = "trained", "untrained", "inputs"


class _Table(Protocol):
    """Features that a probe chooses from: a layer, or a number of components."""

    @property
    def choices(self) -> tuple[int, ...]: ...

    def of(self, choice: int) -> tuple[np.ndarray, np.ndarray]:
        """Features [items, width] of the fit set and of the test set."""
        ...


@dataclass(frozen=True)
class _Layers:
    """The layers of a model; each is read from the file when needed."""

    features: Features
    fit: np.ndarray
    test: np.ndarray

    @property
    def choices(self) -> tuple[int, ...]:
        return self.features.layers

    def of(self, choice: int) -> tuple[np.ndarray, np.ndarray]:
        return self.features.layer(choice, self.fit), self.features.layer(choice, self.test)


@dataclass(frozen=True)
class _InputComponents:
    fit: np.ndarray
    test: np.ndarray

    @property
    def choices(self) -> tuple[int, ...]:
        return tuple(sorted({min(count, self.fit.shape[1]) for count in COMPONENTS}))

    def of(self, choice: int) -> tuple[np.ndarray, np.ndarray]:
        return self.fit[:, :choice], self.test[:, :choice]


@dataclass(frozen=True)
class StudyOptions:
    """`draws` is the number of bootstrap resamples; `label_counts` are smaller fit sets, each drawn `repeats` times."""

    test_share: float = 0.25
    seed: int = 0
    draws: int = 1000
    label_counts: tuple[int, ...] = ()
    repeats: int = 5


@dataclass(frozen=True)
class Study:
    """The data of a study: properties, features of the models, inputs, and checkpoints in training order."""

    properties: list[Property]
    trained: Features
    untrained: Features | None = None
    inputs: RawInputs | None = None
    checkpoints: Mapping[str, Features] = field(default_factory=dict)

    def run(self, options: StudyOptions) -> dict[str, Any]:
        """Run the study and return its report. Raises ProbeError if items are too few or lack features."""
        results = {one.name: self._property(one, options) for one in self.properties}
        report: dict[str, Any] = {
            "trained": str(self.trained.path),
            "untrained": None if self.untrained is None else str(self.untrained.path),
            "inputs": None if self.inputs is None else str(self.inputs.path),
            "checkpoints": {name: str(one.path) for name, one in self.checkpoints.items()},
            "test_share": options.test_share,
            "seed": options.seed,
            "draws": options.draws,
            "properties": results,
        }
        numbers = [one for one in results.values() if one["kind"] == "ridge"]
        if numbers:
            names = numbers[0]["sources"]
            report["mean_r2"] = {name: float(np.mean([n["sources"][name]["test"] for n in numbers])) for name in names}
        return report

    def _property(self, one: Property, options: StudyOptions) -> dict[str, Any]:
        # Divide the items that have both a value and a vector.
        ids, values = one.of(self.trained.ids)
        in_test = np.array([is_test(name, options) for name in ids], dtype=bool)
        fit, test = values[~in_test], values[in_test]
        if len(fit) < SMALLEST_FIT or len(test) < SMALLEST_TEST:
            raise ProbeError(
                f"{one.name}: {len(fit)} items to fit and {len(test)} to test have a value and a vector; expected at "
                f"least {SMALLEST_FIT} and {SMALLEST_TEST}"
            )
        fit_ids = [name for name, tested in zip(ids, in_test, strict=True) if not tested]
        test_ids = [name for name, tested in zip(ids, in_test, strict=True) if tested]
        # The trained model and the baselines on the same items.
        tables: dict[str, _Table] = {TRAINED: _layers(self.trained, fit_ids, test_ids)}
        if self.untrained is not None:
            tables[UNTRAINED] = _layers(self.untrained, fit_ids, test_ids)
        if self.inputs is not None:
            tables[INPUTS] = _InputComponents(*self.inputs.reduced(fit_ids, test_ids, options.seed))
        probe = _Probe(one, fit, test, options)
        found = {name: probe.best(table) for name, table in tables.items()}
        result: dict[str, Any] = {
            "kind": one.kind,
            "score": "R2" if one.kind == "ridge" else "accuracy",
            "fit_items": len(fit),
            "test_items": len(test),
            "without_a_value": len(self.trained.ids) - len(ids),
            "sources": probe.facts(found),
            "trained_minus": {name: probe.difference(found[TRAINED], found[name]) for name in found if name != TRAINED},
        }
        if one.kind == "logistic":
            result["classes"] = list(one.classes)
            result["most_frequent"] = float((test == np.bincount(fit).argmax()).mean())
        # Curves over the number of labels and over training.
        if options.label_counts:
            result["labels"] = probe.label_curves(tables)
        if self.checkpoints:
            steps = {name: _layers(features, fit_ids, test_ids) for name, features in self.checkpoints.items()}
            result["checkpoints"] = probe.facts({name: probe.best(table) for name, table in steps.items()})
        return result


def is_test(name: str, options: StudyOptions) -> bool:
    """Whether an item is in the test set. Depends on its id and the seed only, not on other items or properties."""
    digest = hashlib.sha256(f"{options.seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") < options.test_share * 2**64


def _layers(features: Features, fit: list[str], test: list[str]) -> _Layers:
    return _Layers(features, features.rows_of(fit), features.rows_of(test))


@dataclass(frozen=True)
class _Found:
    """The choice made by cross-validation, and its predictions for the test set."""

    choice: int
    cross_validated: dict[int, float]
    predicted: np.ndarray


@dataclass(frozen=True)
class _Probe:
    """One property, with its values in the fit set and in the test set."""

    property: Property
    fit: np.ndarray
    test: np.ndarray
    options: StudyOptions

    def best(self, table: _Table, items: np.ndarray | None = None) -> _Found:
        """Choose by cross-validation on the fit set, or on some `items` of it, then predict the test set."""
        kind, y = self.property.kind, self.fit if items is None else self.fit[items]
        scores, penalties = {}, {}
        for choice in table.choices:
            x, _ = table.of(choice)
            part = x if items is None else x[items]
            scores[choice], penalties[choice] = cross_validate(kind, part, y, self.options.seed)
        chosen = max(scores, key=lambda choice: scores[choice])
        x, unseen = table.of(chosen)
        predicted = predict(kind, x if items is None else x[items], y, unseen, penalties[chosen])
        return _Found(chosen, scores, predicted)

    def facts(self, found: Mapping[str, _Found]) -> dict[str, Any]:
        kind, options = self.property.kind, self.options
        draws = bootstrap_scores(
            kind, self.test, [one.predicted for one in found.values()], options.seed, options.draws
        )
        return {
            name: {
                "choice": one.choice,
                "cross_validated": {str(choice): value for choice, value in one.cross_validated.items()},
                "test": score(kind, self.test, one.predicted),
                "interval_95": np.quantile(draws[:, column], (0.025, 0.975)).tolist(),
            }
            for column, (name, one) in enumerate(found.items())
        }

    def difference(self, first: _Found, second: _Found) -> dict[str, Any]:
        """Score of `first` minus that of `second` on the same test items, with its bootstrap interval."""
        kind, options = self.property.kind, self.options
        predicted = [first.predicted, second.predicted]
        draws = bootstrap_scores(kind, self.test, predicted, options.seed, options.draws)
        return {
            "test": score(kind, self.test, first.predicted) - score(kind, self.test, second.predicted),
            "interval_95": np.quantile(draws[:, 0] - draws[:, 1], (0.025, 0.975)).tolist(),
        }

    def label_curves(self, tables: Mapping[str, _Table]) -> list[dict[str, Any]]:
        """Test scores of probes fitted to fewer labels, which also choose the layer and the penalty."""
        curves = []
        for count in sorted(set(self.options.label_counts)):
            if count > len(self.fit):
                continue
            scores: dict[str, list[float]] = {name: [] for name in tables}
            for repeat in range(1 if count == len(self.fit) else self.options.repeats):
                rng = np.random.default_rng([self.options.seed, count, repeat])
                items = np.sort(rng.choice(len(self.fit), count, replace=False))
                if self.property.kind == "logistic" and len(np.unique(self.fit[items])) < 2:
                    continue  # a classifier needs two classes
                for name, table in tables.items():
                    scores[name].append(score(self.property.kind, self.test, self.best(table, items).predicted))
            curves.append({"labels": count, "scores": scores})
        return curves
