"""The (TP, PP, DP) at which a model must train the same: ten, of eight ranks at most."""

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
