"""What every pipeline stage must know about a call's micro-batches under megatron-core's schedules.

Messages between stages are hidden states of one shape and nothing else. So the first stage broadcasts, once per call,
the shape of the micro-batches and the positions of isolated documents to the stages that read no data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.engine.batches import PADDING, MicroBatch, padded, sequence
from megatron.model.documents import Documents
from megatron.parallel.place import Place


@dataclass(frozen=True)
class PipelineBatch:
    """One call's micro-batches of b sequences of s tokens: the data that this rank's stage needs, on its device.

    `documents` are those of each micro-batch, None if documents are not isolated.
    """

    micro_batches: list[MicroBatch]
    documents: list[Documents | None]
    b: int
    s: int

    def filled_up(self, multiple: int) -> PipelineBatch:
        """Repeat the last micro-batch until their number is a multiple of `multiple`."""
        again = -len(self.micro_batches) % multiple
        return PipelineBatch(
            self.micro_batches + self.micro_batches[-1:] * again,
            self.documents + self.documents[-1:] * again,
            self.b,
            self.s,
        )


def on_all_stages(
    given: Iterable[Mapping[str, Tensor]] | None,
    count: int,
    place: Place,
    pipe: dist.ProcessGroup,
    padded_length: Callable[[int], int],
) -> PipelineBatch:
    """Share `count` micro-batches, padded to `padded_length`, with all stages. Collective over the pipeline.

    `given` is None on stages that read no data.
    """
    own = [] if given is None else list(given)
    first = own[0] if own else {}
    b, s = sequence(first).shape[:2] if own else (0, 0)
    with_positions = int("positions" in first)
    has_middle = place.pp > 2  # stages that read no data
    if has_middle:
        header = torch.tensor([b, s, with_positions], device=place.device)
        dist.broadcast(header, group=pipe, group_src=0)
        if not own:
            b, s, with_positions = (int(value) for value in header.tolist())
    # Pad on the host, then move to the device.
    length = padded_length(s)
    on_host = [padded(_sequences(micro_batch), length) for micro_batch in own]
    own = [
        {name: tensor.to(place.device, non_blocking=True) for name, tensor in {**micro_batch, **sequences}.items()}
        for micro_batch, sequences in zip(own, on_host, strict=True)
    ]
    if not with_positions:
        return PipelineBatch(own or [{} for _ in range(count)], [None] * count, b, length)
    positions = [micro_batch["positions"] for micro_batch in own]
    read = [sequences["positions"] for sequences in on_host]
    if has_middle:
        whole = torch.stack(positions) if own else torch.empty(count, b, length, dtype=torch.int64, device=place.device)
        dist.broadcast(whole, group=pipe, group_src=0)
        if not own:
            positions, read = list(whole), list(whole.cpu())  # the only wait for the device
    documents = [Documents.at(*pair) for pair in zip(positions, read, strict=True)]
    return PipelineBatch(own or [{} for _ in range(count)], list(documents), b, length)


def _sequences(micro_batch: Mapping[str, Tensor]) -> MicroBatch:
    """Only the fields that are sequences."""
    return {name: tensor for name, tensor in micro_batch.items() if name in PADDING}
