"""How much of a tensor the CPU references process at once; here because the planner, which does not need torch, uses
it."""

from __future__ import annotations

# Elements; 512 KiB of fp32: fits a core's L2, and is still large enough for torch to split one pass over threads.
BLOCK_ELEMENTS = 1 << 17
