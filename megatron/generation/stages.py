"""Messages between pipeline stages during generation: hidden states forward, tokens back.

Sends return at once, and their buffers are kept until they have been sent. Tokens use a separate group: on a GPU the
operations of a group run in order, so that a stage sending hidden states and a neighbor sending tokens would deadlock.
"""

from __future__ import annotations

from collections import deque
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.engine.protocol import Around, Engine, no_phases

_IN_FLIGHT = 64  # number of messages; older ones must have been received, or the run would have stalled


class HiddenLinks:
    """A rank's links to the previous and the next stage. At most `in_flight` sent buffers are kept."""

    def __init__(self, engine: Engine, around: Around = no_phases, in_flight: int = _IN_FLIGHT) -> None:
        self.place, self._hidden, self._around, self._in_flight = engine.place, engine.groups.pipe, around, in_flight
        self._ranks = dist.get_process_group_ranks(self._hidden)
        self._leaving: deque[tuple[Any, Tensor]] = deque()

    def send_hidden(self, hidden: Tensor) -> None:
        """Send hidden states to the next stage; no message if they are empty, as when no logits are wanted."""
        if hidden.numel():
            self._send(hidden, self.place.pp_rank + 1, self._hidden)

    def receive_hidden(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Receive hidden states of this shape from the previous stage."""
        hidden = torch.empty(shape, dtype=dtype, device=self.place.device)
        if hidden.numel() == 0:
            return hidden
        with self._around("pipeline"):
            dist.recv(hidden, src=self._ranks[self.place.pp_rank - 1], group=self._hidden)
        return hidden

    def close(self) -> None:
        """Wait until all messages have been sent."""
        while self._leaving:
            self._leaving.popleft()[0].wait()

    def _send(self, tensor: Tensor, stage: int, group: dist.ProcessGroup | None) -> None:
        tensor = tensor.contiguous()
        self._leaving.append((dist.isend(tensor, dst=self._ranks[stage], group=group), tensor))
        while len(self._leaving) > self._in_flight:
            self._leaving.popleft()[0].wait()


class StageLinks(HiddenLinks):
    """A rank's links to the other stages of its pipeline, for tokens too. Construction is collective over all ranks."""

    def __init__(self, engine: Engine, timeout_minutes: float, around: Around = no_phases) -> None:
        super().__init__(engine, around)
        place = self.place
        self._tokens: dist.ProcessGroup | None = None
        if place.pp > 1:
            per_stage = place.dp * place.tp
            pipes = [list(range(first, place.world_size, per_stage)) for first in range(per_stage)]
            assert self._ranks in pipes
            limit = timedelta(minutes=timeout_minutes)
            self._tokens, _ = dist.new_subgroups_by_enumeration(pipes, timeout=limit)

    def publish_tokens(self, tokens: Tensor) -> None:
        """Send chosen tokens, int64 [n], from the last stage to all others."""
        for stage in range(self.place.pp - 1):
            self._send(tokens, stage, self._tokens)

    def receive_tokens(self, count: int) -> Tensor:
        """Receive chosen tokens, int64 [count], from the last stage."""
        tokens = torch.empty(count, dtype=torch.int64, device=self.place.device)
        with self._around("pipeline"):
            dist.recv(tokens, src=self._ranks[-1], group=self._tokens)
        return tokens

    def close(self) -> None:
        super().close()
        if self._tokens is not None:
            dist.destroy_process_group(self._tokens)
            self._tokens = None
