"""The host emulator detects the faults that it promises to detect, and runs correct kernels."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron.ops.build import SOURCES, Target, compile_command

pytestmark = pytest.mark.kernels

FAULTS = {
    "none": "ok",
    "shuffle in half a wave": "do not meet",
    "shuffle after an early return": "do not meet",
    "different shuffles": "do not meet",
    "shuffle beyond the wave": "a shuffle reads lane",
    "barrier in one wave": "do not meet",
    "barrier against shuffle": "do not meet",
    "read past the end": "a read of 4 bytes is outside every tensor",
    "vector past the end": "a read of 16 bytes is outside every tensor",
    "unaligned vector": "is not aligned",
    "write to the input": "a write of 4 bytes is outside every tensor",
    "missing barrier": "since the last barrier",
    "slots reused": "since the last barrier",
    "shared index": "shared index 128 of 128",
}


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("emulator") / "faulty_kernels"
    source = Path(__file__).with_name("faulty_kernels.cpp")
    subprocess.run([*compile_command(Target("emulator")), f"-I{SOURCES}", str(source), "-o", str(path)], check=True)
    return path


@pytest.mark.parametrize("wave", ["32", "64"])
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(program: Path, fault: str, wave: str) -> None:
    done = subprocess.run([program, fault, wave], capture_output=True, text=True)
    assert done.returncode == 0, done
    assert FAULTS[fault] in done.stdout
