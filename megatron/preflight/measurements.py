"""What one rank measures: its device's matrix multiplications and memory, and its links to one partner at a time."""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist

from megatron.ops.bandwidth import Clock

# Long enough for a GPU's clocks and temperature to settle, short enough for a preflight of minutes.
_SECONDS = {"cuda": 2.0, "cpu": 0.2}
_GEMM = {"cuda": (8192, torch.bfloat16), "cpu": (512, torch.float32)}
_BURST = 8  # multiplications between two looks at the clock
_MESSAGE = {"cuda": 64 << 20, "cpu": 1 << 20}  # bytes
_EXCHANGES = 5


def gemm(device: torch.device) -> float:
    """FLOP/s of square matrix multiplications without a pause: the median burst, on a CPU the best one.

    A CPU is shared with whatever else runs there; what is best says more about it than what is usual.
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


def copy(device: torch.device) -> float:
    """Bytes read and written per second by a plain copy of a tensor that no cache holds."""
    return Clock(device).copy_bandwidth()


def exchange(partner: int, device: torch.device) -> float:
    """Bytes per second in each direction, sent to and received from a partner at the same time; the best of several.

    Raises RuntimeError if something else arrives than the partner has sent.
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
        raise RuntimeError(f"{wrong} of {size // 4} elements that rank {partner} sent arrived as something else")
    return size / min(seconds[1:])  # the first one connects


def payload_pattern(size: int, device: torch.device) -> torch.Tensor:
    """`size` bytes of the small whole numbers that messages are made of, fp32."""
    return (torch.arange(size // 4, device=device) % 3 + 1).float()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
