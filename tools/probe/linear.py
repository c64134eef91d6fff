"""Linear probes of one property with scikit-learn: cross-validated scores, and predictions for unseen items.

Numbers are predicted by ridge regression and scored by R2, classes by logistic regression and accuracy. Features are
standardized with the mean and deviation of the items fitted. Penalties are cross-validated too, never on test items.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from tools.probe.labels import Kind

FOLDS = 5
ALPHAS = np.logspace(-2, 6, 17)  # penalties of ridge, for standardized features
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # C of logistic regression
_SMALLEST = 1e-12  # features with a smaller deviation are constant


def score(kind: Kind, truth: np.ndarray, predicted: np.ndarray) -> float:
    """R2 of numbers, accuracy of classes."""
    if kind == "logistic":
        return float((truth == predicted).mean())
    return float(1 - ((truth - predicted) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())


def cross_validate(kind: Kind, x: np.ndarray, y: np.ndarray, seed: int) -> tuple[float, float]:
    """Return (score of the out-of-fold predictions, penalty) for features [items, width].

    The penalty is the best one for classes, and NaN for numbers: ridge chooses its own in every fit.
    """
    if kind == "ridge":
        predicted = np.empty(len(y))
        for fit, rest in _folds(kind, y, seed):
            predicted[rest] = predict(kind, x[fit], y[fit], x[rest])
        return score(kind, y, predicted), float("nan")
    folds = _folds(kind, y, seed)
    scores = []
    for penalty in PENALTIES:
        classes = np.empty(len(y), dtype=y.dtype)
        for fit, rest in folds:
            classes[rest] = predict(kind, x[fit], y[fit], x[rest], penalty)
        scores.append(score(kind, y, classes))
    best = int(np.argmax(scores))
    return scores[best], PENALTIES[best]


def predict(kind: Kind, x: np.ndarray, y: np.ndarray, unseen: np.ndarray, penalty: float = 1.0) -> np.ndarray:
    """Fit a probe to x and y, and predict `unseen` [items, width]. `penalty` applies to classes only."""
    if kind == "logistic" and len(np.unique(y)) == 1:  # a fold with few labels
        return np.full(len(unseen), y[0])
    mean, deviation = x.mean(0), x.std(0)
    scale = np.where(deviation > _SMALLEST, deviation, 1)
    model = _model(kind, penalty)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ill-conditioned folds and rare classes: the score shows them
        model.fit((x - mean) / scale, y)
    predicted: np.ndarray = model.predict((unseen - mean) / scale)
    return predicted


def _model(kind: Kind, penalty: float) -> Any:
    from sklearn.linear_model import LogisticRegression, RidgeCV

    return RidgeCV(ALPHAS) if kind == "ridge" else LogisticRegression(C=penalty, tol=1e-3, max_iter=300)


def _folds(kind: Kind, y: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import KFold, StratifiedKFold

    if kind == "ridge":
        return list(KFold(min(FOLDS, len(y)), shuffle=True, random_state=seed).split(y))
    rarest = int(np.bincount(y)[np.bincount(y) > 0].min())
    if rarest < 2:  # a class too rare to stratify
        return list(KFold(FOLDS, shuffle=True, random_state=seed).split(y))
    return list(StratifiedKFold(min(FOLDS, rarest), shuffle=True, random_state=seed).split(y, y))


def bootstrap_scores(kind: Kind, truth: np.ndarray, predictions: list[np.ndarray], seed: int, draws: int) -> np.ndarray:
    """Scores [draws, predictions] on resampled test items, the same items for all predictions of a draw."""
    rng = np.random.default_rng(seed)
    scores = np.empty((draws, len(predictions)))
    for draw in range(draws):
        items = rng.integers(len(truth), size=len(truth))
        if kind == "ridge" and np.ptp(truth[items]) == 0:  # R2 is undefined if all values are equal
            items = np.arange(len(truth))
        for column, predicted in enumerate(predictions):
            scores[draw, column] = score(kind, truth[items], predicted[items])
    return scores
