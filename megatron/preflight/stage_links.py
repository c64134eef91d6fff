"""Messages between neighboring stages of the pipeline, as the training sends them: which pairs, how large, how fast.

Activations go one way and gradients the other at the same time. Under `engine: megatron` they use its own directed
links, so these are checked as well; under DeepSpeed they use the world group.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron.neox_arguments import NeoXArgs
from megatron.parallel.neighbors import neighbor_rounds
from megatron.preflight.compare import LINK_SHARE
from megatron.preflight.diagnosis import Roster
from megatron.preflight.measurements import payload_pattern, synchronize
from megatron.preflight.pairings import Pair

if TYPE_CHECKING:
    from megatron.engine.mcore_groups import Links

_EXCHANGES = 5  # after the first one, which connects
_SHOWN = 8  # slow pairs that are named


def stage_message_bytes(args: NeoXArgs) -> int:
    """Bytes that a rank sends to the next stage for one micro-batch: its slice of the sequence or, with DeepSpeed, its
    share; without sequence parallelism every rank of megatron-core sends the whole hidden state."""
    width = 4 if args.precision == "fp32" else 2
    whole = (args.train_micro_batch_size_per_gpu or 1) * args.seq_length * args.hidden_size * width
    shared = args.sequence_parallel or args.engine == "deepspeed"
    return whole // args.model_parallel_size if shared else whole


def stage_rounds(args: NeoXArgs) -> list[list[Pair]]:
    """Rounds of (rank of a stage, rank of the next one) in which each rank has one partner.

    A pair is tried in both directions at once, so two stages that follow each other are one pair.
    """
    stages, ranks = args.pipe_parallel_size, args.data_parallel_size * args.model_parallel_size
    return neighbor_rounds(stages, ranks, closed=args.virtual_pipe_parallel_size > 1 and stages > 2)


def _post(pair: Pair, rank: int, links: Links | None, sent: torch.Tensor, received: torch.Tensor) -> list[dist.Work]:
    """Post the send and the receive of one rank of a pair; RuntimeError if a link does not lead to its partner."""
    forward = rank == pair[0]  # sends activations, receives gradients
    partner = pair[1] if forward else pair[0]
    if links is None:
        both = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received, partner)]
        return dist.batch_isend_irecv(both)
    out, into = (links.hidden_out, links.gradient_in) if forward else (links.gradient_out, links.hidden_in)
    if out is None or into is None or out.peer != partner or into.peer != partner:
        raise RuntimeError(f"rank {rank}'s links lead to {out and out.peer} and {into and into.peer}, not to {partner}")
    posted = (dist.irecv(received, partner, group=into.group), dist.isend(sent, partner, group=out.group))
    return [work for work in posted if work is not None]


def stage_link_rate(pair: Pair, rank: int, size: int, device: torch.device, links: Links | None) -> float:
    """Bytes per second in each direction while both are used, the best of several exchanges of `size` bytes.

    Raises RuntimeError if what arrives is not what was sent.
    """
    partner = pair[1] if rank == pair[0] else pair[0]
    pattern = payload_pattern(size, device)
    sent, expected, received = pattern * (rank + 1), pattern * (partner + 1), torch.empty_like(pattern)
    seconds = []
    for _ in range(1 + _EXCHANGES):
        received.zero_()
        synchronize(device)
        started = time.perf_counter()
        for work in _post(pair, rank, links, sent, received):
            work.wait()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    wrong = int((received != expected).sum())
    if wrong:
        raise RuntimeError(f"{wrong} of {expected.numel()} elements sent by rank {partner} arrived with wrong values")
    return size / min(seconds[1:])


def stage_link_lines(
    rates: Mapping[Pair, float], size: int, roster: Roster, device: torch.device, over_links: bool
) -> list[str]:
    """Report lines about all pairs: spread, slowest, and those far below the median. `rates` are bytes per second."""
    median = statistics.median(rates.values())
    ordered: Sequence[Pair] = sorted(rates, key=lambda pair: rates[pair])

    def named(pair: Pair) -> str:
        return f"{roster.named(pair[0])} and {roster.named(pair[1])}"

    way = "over directed links" if over_links else "over the world group"
    lines = [
        f"neighboring stages: {len(rates)} pairs, {size / 1e6:.3g} MB both ways at once {way}, right; GB/s each way: "
        f"median {median / 1e9:.3g}, min {rates[ordered[0]] / 1e9:.3g}, max {rates[ordered[-1]] / 1e9:.3g}, slowest "
        f"{named(ordered[0])}"
    ]
    slow = [pair for pair in ordered if rates[pair] < LINK_SHARE[device.type] * median]
    lines += [f"slow link: {named(pair)}, {rates[pair] / median:.2f} of the median" for pair in slow[:_SHOWN]]
    if len(slow) > _SHOWN:
        lines.append(f"and {len(slow) - _SHOWN} more slow links")
    return lines


def pair_communicator_bytes(rank: int, world_size: int, size: int, device: torch.device) -> int | None:
    """Device memory that a communicator of two ranks takes outside of torch's allocator, by the driver's count before
    its group is made and after a message of `size` bytes. None on a CPU, and for the last of an odd number of ranks."""
    if device.type != "cuda":
        return None
    pairs = [[first, first + 1] for first in range(0, world_size - 1, 2)]
    message = torch.zeros(size // 4, device=device)
    synchronize(device)
    before, _ = torch.cuda.mem_get_info(device)
    world = dist.group.WORLD
    assert world is not None
    group = dist.split_group(parent_pg=world, split_ranks=pairs)
    taken: int | None = None
    if group is not None:
        dist.broadcast(message, group=group, group_src=0)
        synchronize(device)
        taken = before - torch.cuda.mem_get_info(device)[0]
        dist.destroy_process_group(group)
    return taken


def communicator_line(taken: Sequence[int | None], links: int) -> str:
    """Report line about these communicators; `links` is how many of them a rank of the training has."""
    known = [one for one in taken if one is not None]
    if not known:
        return "a communicator of two ranks: takes no device memory on CPUs"
    mib = sorted(one / 2**20 for one in known)
    return (
        f"a communicator of two ranks takes {statistics.median(mib):.0f} MiB of device memory (min {mib[0]:.0f}, max "
        f"{mib[-1]:.0f}); a rank has {links} to its neighbors, for each of which the plan counts 650"
    )
