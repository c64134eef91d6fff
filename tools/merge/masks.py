"""DARE's random masks, in which every element is drawn independently.

An element's draw depends only on the seed, the tensor's Hugging Face name, the model's label and the element's index in
the logical tensor: not on the order of models or tensors, nor on tiles, threads, shards or the tensor-parallel size of
an input or output.

Scheme 1. The generator is Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), whose
output is a function of a key and a counter. The key is the first 16 bytes of SHA-256("SEED\\0TENSOR\\0LABEL") as two
little-endian words. Counter c + 1 gives four 64-bit words, which are, as 16-bit numbers in little-endian order, the
draws of elements 16 c to 16 c + 15. An element is kept if its draw is below round(density * 65536).
"""

from __future__ import annotations

import hashlib

import numpy as np

SCHEME = "philox4x64-10/sha256/16-bit, version 1"
RESOLUTION = 1 << 16  # densities are multiples of 1 / RESOLUTION
_PER_BLOCK = 16  # draws of one counter value


def mask_key(seed: int, tensor: str, label: str) -> np.ndarray:
    """The two words of Philox's key."""
    digest = hashlib.sha256(f"{seed}\0{tensor}\0{label}".encode()).digest()
    return np.frombuffer(digest[:16], "<u8")


def threshold(density: float) -> int:
    """The limit below which a draw is kept, from 0 to RESOLUTION (all are kept)."""
    return round(density * RESOLUTION)


def draws(key: np.ndarray, start: int, count: int) -> np.ndarray:
    """16-bit draws of elements `start` to `start + count`."""
    block, skipped = divmod(start, _PER_BLOCK)
    words = -(-(skipped + count) // 4)
    # NumPy increments the counter before drawing: starting from c, its first block is that of c + 1.
    raw = np.random.Philox(key=key, counter=[block, 0, 0, 0]).random_raw(words)
    return raw.astype("<u8", copy=False).view("<u2")[skipped : skipped + count]


def keep_mask(key: np.ndarray, start: int, count: int, limit: int) -> np.ndarray:
    """Mask of elements `start` to `start + count`: True where the draw is below `limit`."""
    return draws(key, start, count) < limit
