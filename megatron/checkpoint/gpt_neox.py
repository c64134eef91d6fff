"""A checkpoint without a manifest, which GPT-NeoX wrote: what the names of its files say. Without torch."""

from __future__ import annotations

from collections.abc import Iterable

from megatron.checkpoint.layer_set import stored_tp
from megatron.checkpoint.zero_files import rank_of_file


def layout_of_names(names: Iterable[str]) -> dict[str, int]:
    """`tp` as the layer files say, `pp` and `dp` as the optimizer files say; what they do not say is left out."""
    names = list(names)
    tp = stored_tp(names)
    if tp is None:
        return {}
    ranks = [rank for name in names if (rank := rank_of_file(name)) is not None]
    if not ranks:
        return {"tp": tp}
    model_ranks = 1 + max(model_rank for _, model_rank in ranks)
    return {"tp": tp, "pp": model_ranks // tp, "dp": 1 + max(dp_rank for dp_rank, _ in ranks)}
