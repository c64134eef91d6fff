"""Messages between pipeline stages over directed links, for megatron-core's schedules.

megatron-core sends both directions over one group. If a group has one communicator (torch with a bound device), a
waiting receive blocks the sends after it; and with two stages and virtual stages, both neighbors are the same rank, so
that a batched exchange mistakes hidden states for gradients. On a link one rank only sends and the other only receives,
in the order of the schedule: no posting order can deadlock, and no message can be mistaken for another.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megatron.engine.mcore_groups import Link, Links
from megatron.engine.protocol import Around


class _Arrival:
    """A message in flight; the wait for it counts as phase `pipeline`."""

    def __init__(self, work: Any, around: Around) -> None:
        self._work, self._around = work, around

    def wait(self) -> None:
        with self._around("pipeline"):
            self._work.wait()


class LinkP2P(P2PCommunicator):
    """megatron-core's communicator over `links`."""

    def __init__(
        self,
        pipe: dist.ProcessGroup,
        config: ModelParallelConfig,
        links: Links,
        device: torch.device,
        around: Around,
    ) -> None:
        super().__init__(pipe, config)
        self.links, self.device, self.around = links, device, around

    def _communicate(
        self,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, dict[str, _Arrival] | None]:
        """Post the requested messages; returns (hidden states, gradient, handles), handles None after `wait_on_reqs`.

        Sent tensors are detached, because the schedule frees its output while the message is in flight.
        """
        hidden, gradient = (
            torch.empty(tensor_shape, dtype=self.config.pipeline_dtype, device=self.device, requires_grad=True)
            if wanted
            else None
            for wanted in (recv_prev, recv_next)
        )
        work = {}
        if hidden is not None:
            work["recv_prev"] = _receive(hidden, self.links.hidden_in)
        if gradient is not None:
            work["recv_next"] = _receive(gradient, self.links.gradient_in)
        if tensor_send_next is not None:
            work["send_next"] = _send(tensor_send_next, self.links.hidden_out)
        if tensor_send_prev is not None:
            work["send_prev"] = _send(tensor_send_prev, self.links.gradient_out)
        if not wait_on_reqs:
            return hidden, gradient, {name: _Arrival(handle, self.around) for name, handle in work.items()}
        for handle in work.values():
            handle.wait()
        return hidden, gradient, None


def _receive(tensor: Tensor, link: Link | None) -> Any:
    assert link is not None
    return dist.irecv(tensor.detach(), src=link.peer, group=link.group)


def _send(tensor: Tensor, link: Link | None) -> Any:
    assert link is not None
    return dist.isend(tensor.detach().contiguous(), dst=link.peer, group=link.group)
