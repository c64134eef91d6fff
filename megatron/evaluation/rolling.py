"""A text of any length as pairs that score each of its tokens once."""

from __future__ import annotations

from megatron.evaluation.scoring import Pair


def rolling_pairs(ids: tuple[int, ...], prefix: int, seq_length: int) -> list[Pair]:
    """Pairs whose continuations are `ids`, cut every `seq_length` tokens.

    The first token follows `prefix`. Later pieces are predicted after as many of the tokens before them as fit, one at
    least: the last piece, which is shorter, sees more. These are lm-eval's windows.
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
