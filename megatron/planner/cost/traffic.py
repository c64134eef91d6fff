"""Communication between ranks in a step: bytes by textbook formulas, seconds from the location of the groups.

Ranks are numbered tensor-parallel innermost, then data, then pipeline (`megatron.parallel.gpu_placement`), and filled
into nodes in order, so that a tensor-parallel group stays inside a node.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.layout import LlamaShape
from megatron.planner.cost.compute import BF16, FP32
from megatron.planner.cost.machines import Machine, cut_rate, link_rate, ring_rate
from megatron.planner.cost.parallel_layout import ParallelLayout

# Elements reduced together: DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE, and the default of `reduce_bucket_size`
REDUCTION_BUCKET = 500_000_000


def ring_bytes(ranks: int, size: float) -> float:
    """Bytes that each rank sends in a ring all-reduce of `size` bytes; an all-gather or a reduce-scatter sends half."""
    return 2.0 * (ranks - 1) / ranks * size


def group_rate(machine: Machine, local_ranks: Sequence[int]) -> float:
    """Bytes per second that a ring collective moves per rank among ranks of one node.

    Two rings, one in each direction, each as fast as its slowest link; together never more than what the links carry
    across any cut of the group.
    """
    gcds = tuple(sorted(machine.gcds(local_ranks)))
    return machine.collective * min(2.0 * ring_rate(gcds), cut_rate(gcds))


@dataclass(frozen=True)
class HalfCollectives:
    """Gathers and reduce-scatters of a hidden state over tensor-parallel ranks; an all-reduce is one of each.

    `beside` of the backward ones run concurrently with a product that does not need their result.
    """

    forward: int
    backward: int
    beside: int

    @property
    def all(self) -> int:
        return self.forward + self.backward


def layer_collectives(layout: ParallelLayout) -> HalfCollectives:
    """Half-collectives of one decoder layer and micro-batch, without recomputation.

    Plain: an all-reduce after attention and after the MLP; in the backward pass one of each block's input gradient,
    concurrent with the product that computes the weight gradient. Sequence parallelism: a gather before and a scatter
    after each block; the reverse in the backward pass, plus a second gather of each block's input, which is not stored.
    """
    if layout.tensor == 1:
        return HalfCollectives(0, 0, 0)
    return HalfCollectives(4, 6, 4) if layout.sequence_parallel else HalfCollectives(4, 4, 4)


def end_collectives(layout: ParallelLayout, first: bool, last: bool) -> int:
    """Half-collectives of the embedding on the first stage and of the head on the last, both passes."""
    if layout.tensor == 1:
        return 0
    # The embedding's output is all-reduced, or scattered and its gradient gathered; the gradient of the head's input is
    # all-reduced, or the input is gathered, gathered again, and its gradient scattered.
    return 2 * first + (3 if layout.sequence_parallel else 2) * last


def half_bytes(shape: LlamaShape, layout: ParallelLayout, seq_length: int) -> float:
    """Bytes that a rank sends in a gather or a reduce-scatter of a micro-batch's hidden state."""
    return ring_bytes(layout.tensor, BF16 * layout.micro_batch * seq_length * shape.hidden_size) / 2


def tensor_bytes_per_layer(shape: LlamaShape, layout: ParallelLayout, seq_length: int) -> float:
    """Ring traffic of a rank in one decoder layer and micro-batch: that of `layer_collectives`, and the forward's again
    if the layer is recomputed."""
    halves = layer_collectives(layout)
    return (halves.all + halves.forward * (layout.recompute == "full")) * half_bytes(shape, layout, seq_length)


def tensor_rate(layout: ParallelLayout, machine: Machine) -> float:
    """Bytes per second per rank in the slowest tensor-parallel group of a node; a larger group uses the network too."""
    t, node = layout.tensor, machine.gpus_per_node
    if t > node:
        return min(group_rate(machine, range(node)), machine.collective * machine.node_network_rate)
    return min(group_rate(machine, range(first, first + t)) for first in range(0, node - t + 1, t))


def message_bytes(shape: LlamaShape, layout: ParallelLayout, seq_length: int) -> float:
    """Bytes that a rank sends to the next stage for one micro-batch, and receives back as the gradient.

    DeepSpeed splits the hidden state over the tensor-parallel ranks (`pipe_partitioned`, `grad_partitioned`); with
    sequence parallelism it is already split. Without, every rank of megatron-core sends all of it.
    """
    whole = BF16 * layout.micro_batch * seq_length * shape.hidden_size
    return whole if layout.engine == "megatron" and not layout.sequence_parallel else whole / layout.tensor


def message_gathers(layout: ParallelLayout, first: bool, last: bool) -> int:
    """Gathers of a whole hidden state over the tensor-parallel ranks that DeepSpeed's splitting costs a stage in each
    micro-batch: of the received input, of the stage's own output and of its gradient. With sequence parallelism the
    layers take slices."""
    if layout.tensor == 1 or layout.sequence_parallel or layout.engine == "megatron":
        return 0
    return (not first) + 2 * (not last)


def boundary_rate(boundary: int, layout: ParallelLayout, machine: Machine) -> float:
    """Bytes per second of each rank from stage `boundary` to the next one, all of the stage's ranks sending at once."""
    return _rate_between(boundary, boundary + 1, layout, machine)


def wrap_rate(layout: ParallelLayout, machine: Machine) -> float:
    """As `boundary_rate`, for the messages of virtual stages from the last stage back to the first."""
    return _rate_between(layout.pipe - 1, 0, layout, machine)


def _rate_between(sender: int, receiver: int, layout: ParallelLayout, machine: Machine) -> float:
    ranks, per_node = layout.tensor * layout.data, machine.gpus_per_node
    low, high = sorted((sender, receiver))
    if low * ranks // per_node == ((high + 1) * ranks - 1) // per_node:  # both stages in one node
        ends = (stage * ranks % per_node for stage in (sender, receiver))
        senders, receivers = (machine.gcds(range(first, first + ranks)) for first in ends)
        return min(map(link_rate, senders, receivers))
    return min(machine.nic_rate, machine.node_network_rate / min(ranks, per_node))


def data_rate(layout: ParallelLayout, machine: Machine) -> float:
    """Bytes per second per rank of a data-parallel group's ring. Where it spans nodes, the tensor-parallel ranks'
    groups share the node's network."""
    ranks = layout.tensor * layout.data
    here = tuple(range(0, min(ranks, machine.gpus_per_node), layout.tensor))
    inside = group_rate(machine, here) if len(here) > 1 else math.inf
    if ranks <= machine.gpus_per_node:
        return inside
    network = machine.node_network_rate / min(layout.tensor, machine.gpus_per_node)
    return min(inside, machine.collective * network)


def reduction_seconds(parameters: float, layout: ParallelLayout, machine: Machine) -> float:
    """The gradients' all-reduce. `BF16_Optimizer` reduces full fp32 gradients after the last micro-batch, overlapped
    with nothing."""
    if layout.data == 1:
        return 0.0
    buckets = math.ceil(parameters / REDUCTION_BUCKET)
    hops = 2 * (layout.data - 1) * machine.hop_seconds
    return ring_bytes(layout.data, FP32 * parameters) / data_rate(layout, machine) + buckets * hops


def scatter_seconds(parameters: float, layout: ParallelLayout, machine: Machine) -> float:
    """The gradients' reduce-scatter in fp32 by megatron-core's distributed optimizer: half of an all-reduce."""
    if layout.data == 1:
        return 0.0
    hops = (layout.data - 1) * machine.hop_seconds
    return ring_bytes(layout.data, FP32 * parameters) / 2 / data_rate(layout, machine) + hops


def gather_seconds(parameters: float, layout: ParallelLayout, machine: Machine) -> float:
    """The gather of bf16 weights after the step: each rank has updated its share."""
    if layout.data == 1:
        return 0.0
    hops = (layout.data - 1) * machine.hop_seconds
    return ring_bytes(layout.data, BF16 * parameters) / 2 / data_rate(layout, machine) + hops
