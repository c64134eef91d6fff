"""Splits a text of any length into pairs that score each of its tokens once."""

from __future__ import annotations

from megatron.evaluation.scoring import Pair


def rolling_pairs(ids: tuple[int, ...], prefix: int, seq_length: int) -> list[Pair]:
    """Pairs whose continuations are `ids`, cut every `seq_length` tokens: lm-eval's rolling windows.

    The context of the first piece is `prefix`. Later pieces have as many of the preceding tokens as fit, at least one;
    the last piece, if shorter, has more.
    """
    pairs = []
    for start in range(0, len(ids), seq_length):
        piece = ids[start : start + seq_length]
        if start == 0:
            context: tuple[int, ...] = (prefix,)
        else:
            context = ids[max(0, start - (seq_length + 1 - len(piece))) : start]
        pairs.append(Pair(context, piece))
    return pairs
