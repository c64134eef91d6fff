"""The readers on 4,000 damaged files: each is either read or rejected with a `ConvertError`."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from tools.convert_hf.errors import ConvertError
from tools.convert_hf.formats.pickles import read_pickle
from tools.convert_hf.formats.safetensors_file import read_safetensors_header
from tools.convert_hf.formats.torch_file import open_torch

pytestmark = pytest.mark.unit

ROUNDS = 1000
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF)


def mutate(data: bytes, chance: random.Random, within: int) -> bytes:
    """One to four corruptions in the first or last `within` bytes."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        if not out:
            break
        at = chance.randrange(min(within, len(out)))
        if chance.random() < 0.4:
            at = len(out) - 1 - at
        kind = chance.randrange(6)
        if kind == 0:
            out[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            out[at] = chance.choice(_NUMBERS)
        elif kind == 2:
            del out[at : at + chance.randint(1, 16)]
        elif kind == 3:
            out[at:at] = out[at : at + chance.randint(1, 16)]
        elif kind == 4:
            out[at : at + 8] = chance.choice((0, 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1)).to_bytes(
                8, "little"
            )
        else:
            del out[at:]
    return bytes(out)


def read_torch(path: Path) -> None:
    size = path.stat().st_size
    assert all(s.offset + s.nbytes <= size for s in open_torch(path).tensors().values())


def read_safetensors(path: Path) -> None:
    size = path.stat().st_size
    assert all(s.offset + s.nbytes <= size for s in read_safetensors_header(path).values())


def good_torch() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a.weight": torch.arange(40.0).view(8, 5), "b": torch.ones(3).bfloat16(), "c": None}, buffer)
    return buffer.getvalue()


def good_safetensors() -> bytes:
    return save({"a.weight": torch.arange(40.0).view(8, 5), "b": torch.ones(3).bfloat16()}, {"format": "pt"})


@pytest.mark.parametrize(
    ("good", "read", "within"), [(good_safetensors, read_safetensors, 220), (good_torch, read_torch, 900)]
)
def test_damaged_files(good: Callable[[], bytes], read: Callable[[Path], None], within: int, tmp_path: Path) -> None:
    chance, data, path = random.Random(5), good(), tmp_path / "file"
    path.write_bytes(data)
    read(path)
    refused = 0
    for _ in range(ROUNDS):
        path.write_bytes(mutate(data, chance, within))
        try:
            read(path)
        except ConvertError:
            refused += 1
    assert refused > ROUNDS / 2


def test_damaged_pickles() -> None:
    import zipfile

    archive = zipfile.ZipFile(io.BytesIO(good_torch()))
    data = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    chance = random.Random(6)
    refused = 0
    for _ in range(ROUNDS):
        try:
            read_pickle(mutate(data, chance, len(data)), "test", inert=chance.random() < 0.5)
        except ConvertError:
            refused += 1
    assert refused > ROUNDS / 2


def test_damaged_header_values(tmp_path: Path) -> None:
    """Valid JSON with hostile values."""
    data = good_safetensors()
    length = int.from_bytes(data[:8], "little")
    header, chance, path = json.loads(data[8 : 8 + length]), random.Random(7), tmp_path / "file"
    hostile = [
        -1,
        0,
        1,
        1 << 31,
        1 << 64,
        10**400,
        0.5,
        True,
        None,
        "",
        "F32",
        [],
        [0],
        [0, 1, 2],
        {},
        [[1]],
        [1 << 70] * 9,
    ]
    refused = 0
    for _ in range(ROUNDS):
        damaged = json.loads(json.dumps(header))
        entry = damaged[chance.choice(["a.weight", "b"])]
        key = chance.choice(["dtype", "shape", "data_offsets"])
        if chance.random() < 0.5 or key == "dtype":
            entry[key] = chance.choice(hostile)
        else:
            entry[key][chance.randrange(len(entry[key]))] = chance.choice(hostile)
        text = json.dumps(damaged).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        try:
            read_safetensors(path)
        except ConvertError:
            refused += 1
    assert refused > ROUNDS * 0.8
