"""Ten layouts (TP, PP, DP) of at most eight ranks, at which a model must train alike."""

from __future__ import annotations

SPLITS = [
    (1, 1, 1),
    (2, 1, 1),
    (1, 2, 1),
    (1, 1, 2),
    (2, 2, 1),
    (2, 1, 2),
    (1, 2, 2),
    (4, 1, 1),
    (1, 4, 1),
    (2, 2, 2),
]
