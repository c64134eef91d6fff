"""CRC-32 equals zlib's with every implementation."""

from __future__ import annotations

import importlib
import random
import sys
import zlib

import pytest

from megatron.common import crc

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("installed", [True, False])
def test_values_equal_zlib(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not installed:
        monkeypatch.setitem(sys.modules, "isal", None)
        monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)
    try:
        module = importlib.reload(crc)
        assert installed or module.crc32 is zlib.crc32
        for length in (0, 1, 63, 64, 1_000, 70_001):
            data = random.Random(length).randbytes(length)
            for start in (0, 0xDEADBEEF):
                assert module.crc32(memoryview(data), start) == zlib.crc32(data, start)
    finally:
        monkeypatch.undo()
        importlib.reload(crc)


def test_of_pieces() -> None:
    data = random.Random(1).randbytes(5_000)
    for cut in (0, 1, 64, 4_999, 5_000):
        first, second = crc.crc32(data[:cut]), crc.crc32(data[cut:])
        assert crc.combine(first, second, len(data) - cut) == zlib.crc32(data)
        assert crc.zeros(cut) == zlib.crc32(bytes(cut))
