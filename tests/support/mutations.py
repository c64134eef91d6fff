"""Random damage to text and bytes, reproducible by a seed."""

from __future__ import annotations

import random

_PIECES = (
    "{", "}", "[", "]", ":", ",", "-", "\n", "  ", "null", "true", "1e999", "-1", "0x", "~", "&a", "*a", "!!int",
    "!!set", "!!timestamp 1", "!!binary x", "? [a]\n: b", "<<: *a", "'", '"', "#", "|", ">", "%", "@", "\t", "\x00",
    "\ud7ff", "${X}", "9" * 5000, ".nan", ".inf", "[[[[[[[[", "\N{BOM}",
)  # fmt: skip


def mutated_text(text: str, chance: random.Random) -> str:
    """The text with one to four pieces removed, duplicated, swapped or inserted."""
    for _ in range(chance.randint(1, 4)):
        at, length = chance.randrange(len(text) + 1), chance.randint(1, 12)
        kind = chance.randrange(4)
        if kind == 0:
            text = text[:at] + text[at + length :]
        elif kind == 1:
            text = text[:at] + text[at : at + length] * 2 + text[at + length :]
        elif kind == 2:
            text = text[:at] + chance.choice(_PIECES) + text[at:]
        else:
            lines = text.splitlines(keepends=True)
            chance.shuffle(lines)
            text = "".join(lines[: chance.randint(1, max(1, len(lines)))])
    return text


def mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    """The bytes with one to four corruptions at the beginning, the end or anywhere."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        if not out:
            break
        at = chance.randrange(min(len(out), chance.choice((64, 512, len(out)))))
        at = len(out) - 1 - at if chance.random() < 0.5 else at
        kind = chance.randrange(4)
        if kind == 0:
            out[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            out[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            del out[at : at + chance.randint(1, 16)]
        else:
            out[at:at] = out[at : at + chance.randint(1, 16)]
    return bytes(out)
