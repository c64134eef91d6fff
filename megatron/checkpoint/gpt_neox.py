"""The layout of a checkpoint without a manifest, which GPT-NeoX wrote, from its file names. Without torch."""

from __future__ import annotations

from collections.abc import Iterable

from megatron.checkpoint.layer_set import stored_tp
from megatron.checkpoint.zero_files import rank_of_file


def layout_of_names(names: Iterable[str]) -> dict[str, int]:
    """`tp` from the names of layer files, `pp` and `dp` from those of optimizer files; unknown sizes are left out."""
    names = list(names)
    tp = stored_tp(names)
    if tp is None:
        return {}
    ranks = [rank for name in names if (rank := rank_of_file(name)) is not None]
    if not ranks:
        return {"tp": tp}
    model_ranks = 1 + max(model_rank for _, model_rank in ranks)
    return {"tp": tp, "pp": model_ranks // tp, "dp": 1 + max(dp_rank for dp_rank, _ in ranks)}
