"""Measurements of one rank: its device's matrix multiplications and memory, its link to one partner at a time."""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist

from megatron.ops.bandwidth import Clock

# Long enough for a GPU's clocks and temperature to settle, short enough for a preflight of a few minutes.
_SECONDS = {"cuda": 2.0, "cpu": 0.2}
_GEMM = {"cuda": (8192, torch.bfloat16), "cpu": (512, torch.float32)}
_BURST = 8  # multiplications between two readings of the clock
_MESSAGE = {"cuda": 64 << 20, "cpu": 1 << 20}  # bytes
_EXCHANGES = 5


def gemm_rate(device: torch.device) -> float:
    """FLOP/s of continuous square matrix multiplications: the median burst, on a CPU the best one.

    A CPU is shared with other processes, so its best burst is more representative than the median.
    """
    size, dtype = _GEMM[device.type]
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    rates: list[float] = []
    synchronize(device)
    started = time.perf_counter()
    while not rates or time.perf_counter() - started < _SECONDS[device.type]:
        before = time.perf_counter()
        for _ in range(_BURST):
            torch.mm(left, right, out=out)
        synchronize(device)
        rates.append(_BURST * 2 * size**3 / (time.perf_counter() - before))
    return statistics.median(rates) if device.type == "cuda" else max(rates)


def memory_copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by a plain copy of a tensor too large for any cache."""
    return Clock(device).copy_bandwidth()


def measured_link_rate(partner: int, device: torch.device) -> float:
    """Bytes per second in each direction, while sending to and receiving from a partner; the best of several exchanges.

    Raises RuntimeError if the data that arrives is not what the partner sent.
    """
    size = _MESSAGE[device.type]
    pattern = payload_pattern(size, device)
    sent, expected, received = pattern * (dist.get_rank() + 1), pattern * (partner + 1), torch.empty_like(pattern)
    seconds = []
    for _ in range(1 + _EXCHANGES):
        received.zero_()
        synchronize(device)
        started = time.perf_counter()
        both = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received, partner)]
        for work in dist.batch_isend_irecv(both):
            work.wait()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    wrong = int((received != expected).sum())
    if wrong:
        raise RuntimeError(f"{wrong} of {size // 4} elements sent by rank {partner} arrived with wrong values")
    return size / min(seconds[1:])  # the first one connects


def payload_pattern(size: int, device: torch.device) -> torch.Tensor:
    """A message of `size` bytes: small whole numbers in fp32."""
    return (torch.arange(size // 4, device=device) % 3 + 1).float()


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
