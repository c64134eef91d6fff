"""Where the documents of isolated samples begin and end, on the host: asked for once per micro-batch and stage."""

from __future__ import annotations

from torch import Tensor

_ATTRIBUTE = "_document_edges"


def document_edges(positions: Tensor) -> list[list[int]]:
    """Of every sample of `positions` [b, s] the starts of its documents, which are 0 there, and s at the end.

    The first call copies the positions to the host, which waits for the device. The result stays with the tensor, which
    all layers of a stage share, also when they are recomputed, until the tensor's content changes. Tensors of inference
    mode do not count their changes and are read each time.
    """
    kept = not positions.is_inference()
    version, edges = getattr(positions, _ATTRIBUTE, (None, []))
    if kept and version == positions._version:
        known: list[list[int]] = edges
        return known
    length = positions.shape[1]
    found = []
    for row in positions.tolist():
        starts = [place for place, position in enumerate(row) if position == 0 and place > 0]
        found.append([0, *starts, length])
    if kept:
        setattr(positions, _ATTRIBUTE, (positions._version, found))
    return found
