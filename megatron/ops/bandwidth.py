"""Times functions with cold caches on a GPU or CPU, and measures the copy bandwidth to compare them with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

COLD_BYTES = 512 << 20  # written between two runs on a GPU: larger than any last-level cache there
CPU_COLD_BYTES = 64 << 20


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and quartiles over many calls."""

    median: float
    low: float
    high: float


class Clock:
    """Times functions on one device; before each call, their inputs are evicted from the caches."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = CPU_COLD_BYTES if device.type == "cpu" else COLD_BYTES
        self.scratch = torch.empty(size // 4, dtype=torch.float32, device=device)

    def time(self, function: Callable[[], object], runs: int = 30) -> Timing:
        for _ in range(3):
            function()
        seconds = [self._once(function) for _ in range(runs)]
        low, median, high = statistics.quantiles(seconds, n=4)
        return Timing(median, low, high)

    def _once(self, function: Callable[[], object]) -> float:
        self.scratch.zero_()
        if self.device.type == "cpu":
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        function()
        after.record()
        torch.cuda.synchronize(self.device)
        return before.elapsed_time(after) / 1e3

    def copy_bandwidth(self) -> float:
        """Bytes read and written per second by a plain copy of a large tensor."""
        source: Tensor = self.scratch[: self.scratch.numel() // 2]
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.time(lambda: target.copy_(source)).median
