"""The header of a safetensors file, which fixes the position of every tensor before any is written.

The library itself writes only tensors that are in memory; files here are written range by range, by several ranks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_ALIGN = 64


def header_bytes(entries: Mapping[str, Any]) -> bytes:
    """u64 length, little-endian, and `entries` as JSON, padded with spaces: the data begin at a multiple of 64 bytes.

    An entry is `{"dtype": ..., "shape": [...], "data_offsets": [begin, end]}` by tensor name, offsets in bytes from the
    end of the header; `__metadata__` is text by name (https://huggingface.co/docs/safetensors, "Format").
    """
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)
    return len(text).to_bytes(8, "little") + text
