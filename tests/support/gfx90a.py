"""The kernels as hipcc compiles them for gfx90a: registers, occupancy, vector accesses, arithmetic against the budget.

`python -m tests.support.gfx90a` compiles the sources and writes docs/kernels_gfx90a.md; test_gfx90a.py compiles again
and fails where the result is worse than the committed table. Nothing here runs on a GPU.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron.ops.build import KERNEL_FILES, SOURCES, Target, compile_command, compiler_environment

TABLE = SOURCES.parents[1] / "docs" / "kernels_gfx90a.md"
WAVE = 64
# Lane-instructions per second of a GCD, 110 CUs x 64 lanes x 1.7 GHz, over the bandwidth of a copy, 1.35 TB/s.
VALU_SLOTS_PER_BYTE = 110 * 64 * 1.7e9 / 1.35e12
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "float": 4}
# Instructions at a quarter of the rate: transcendentals, 32-bit integer products, 64-bit shifts.
QUARTER_RATE = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_|v_mul_(lo|hi)_|v_mad_[ui]64_|v_lsh[lr]rev_b64|v_\w+_f64")


@dataclass(frozen=True)
class Kernel:
    """A kernel instantiation; `share` is the fraction of the arithmetic budget used at full bandwidth, for hot ones."""

    name: str
    vgprs: int
    waves: int
    lds: int
    spills: int
    scratch: int
    vector_loads: int
    vector_stores: int
    share: float | None


def toolchain() -> tuple[str, str] | None:
    """(hipcc, llvm-objdump), or None if one is missing."""
    hipcc = shutil.which("hipcc")
    objdump = shutil.which("llvm-objdump-15") or shutil.which("llvm-objdump", path="/opt/rocm/llvm/bin")
    return (hipcc, objdump) if hipcc and objdump else None


def compile_all(architecture: str = "gfx90a") -> list[Kernel]:
    """Every kernel instantiation of the library, as compiled."""
    tools = toolchain()
    if tools is None:
        raise RuntimeError("hipcc and llvm-objdump are needed: apt install hipcc libamdhip64-dev rocm-device-libs lld")
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for name in KERNEL_FILES:
            code = Path(folder) / f"{name}.co"
            flags = ["--offload-device-only", "--no-gpu-bundle-output", "-Rpass-analysis=kernel-resource-usage"]
            command = [*compile_command(Target("rocm", (architecture,))), *flags]
            command += ["-c", str(SOURCES / f"{name}.cu"), "-o", str(code)]
            job = subprocess.Popen(command, env=compiler_environment(), stderr=subprocess.PIPE, text=True)
            jobs.append((code, job))
        for code, job in jobs:
            remarks = job.communicate()[1]
            if job.returncode:
                raise RuntimeError(f"hipcc failed on {code.stem}:\n{remarks}")
            disassembly = subprocess.run([tools[1], "-d", str(code)], capture_output=True, text=True, check=True).stdout
            kernels += list(_kernels(remarks, disassembly, _wave_sizes(code)))
    return sorted(kernels, key=lambda k: k.name)


def _wave_sizes(code: Path) -> dict[str, int]:
    readelf = shutil.which("llvm-readelf-15") or shutil.which("llvm-readelf", path="/opt/rocm/llvm/bin")
    notes = subprocess.run([str(readelf), "--notes", str(code)], capture_output=True, text=True, check=True).stdout
    names = re.findall(r"\.name:\s+(_Z\w+|\w+)\n(?:.*\n)*?\s+\.wavefront_size: (\d+)", notes)
    return {name: int(size) for name, size in names}


def _kernels(remarks: str, disassembly: str, waves: dict[str, int]) -> Iterator[Kernel]:
    bodies = dict(re.findall(r"^[0-9a-f]+ <(\w+)>:\n((?:\t.*\n)+)", disassembly, re.MULTILINE))
    for block in remarks.split("Function Name: ")[1:]:
        symbol = block.split()[0]
        if waves.get(symbol) != WAVE:
            raise RuntimeError(f"{symbol} is compiled for waves of {waves.get(symbol)} lanes, expected {WAVE}")

        def value(key: str, block: str = block) -> int:
            found = re.search(rf"{re.escape(key)}[^:]*: (\d+)", block)
            assert found, f"hipcc's remark has no {key}"
            return int(found.group(1))

        name, body = _short_name(symbol), bodies[symbol]
        loads, stores = (len(re.findall(rf"global_{kind}_dwordx4", body)) for kind in ("load", "store"))
        scratch = value("ScratchSize") + len(re.findall(r"\b(scratch|buffer)_(load|store)", body))
        yield Kernel(
            name, value("VGPRs") + value("AGPRs"), value("Occupancy"), value("LDS Size"),
            value("VGPRs Spill") + value("SGPRs Spill"), scratch, loads, stores, _budget_share(name, body),
        )  # fmt: skip


def _short_name(symbol: str) -> str:
    plain = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    plain = re.sub(r"neox::|\(anonymous namespace\)::|^void ", "", plain)
    return re.sub(r"\(.*", "", plain)


def _budget_share(name: str, body: str) -> float | None:
    """VALU slots that a lane needs per byte moved, relative to those available per byte at full bandwidth."""
    found = re.match(r"(\w+)<(.*)>$", name)
    if not found:
        return None
    op, arguments = found.group(1), found.group(2).split(", ")
    size = ELEMENT_BYTES[arguments[0]]
    vector = 16 // size
    instructions = [(int(a, 16), text) for text, a in re.findall(r"^\t(.*?)\s*// ([0-9A-F]+):", body, re.MULTILINE)]
    loop = _hot_loop(body, instructions)
    if op == "rms_norm_forward":
        elements, size_each, code = int(arguments[2]) * vector, (8 if arguments[4] == "true" else 4), instructions
    elif op == "rms_norm_backward":
        elements, size_each, code = int(arguments[2]) * vector, (8 if arguments[4] == "true" else 6), loop
    elif arguments[-1] == "1":
        return None  # scalar variants for odd shapes
    elif op == "rotary":
        elements, size_each, code = 2 * 2 * vector, 4, loop  # two heads at once
    elif op in ("swiglu_forward", "swiglu_backward"):
        elements, size_each, code = vector, 6 if op == "swiglu_forward" else 10, instructions
    elif op == "cross_entropy_stats":
        elements, size_each, code = 4 * vector, 2, loop
    elif op == "cross_entropy_gradient":
        elements, size_each, code = 2 * vector, 4, instructions
    else:
        return None
    slots = sum(4 if QUARTER_RATE.match(text) else 1 for _, text in code if text.startswith("v_"))
    return slots / (elements * size_each * size / 2) / VALU_SLOTS_PER_BYTE


def _hot_loop(body: str, instructions: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """The instructions of the loop with the most vector loads, the shortest of several."""
    start = instructions[0][0]
    best: tuple[int, int, list[tuple[int, str]]] = (0, 0, [])
    for at, target in re.findall(r"s_c?branch\w* .*// ([0-9A-F]+):.*<\w+\+0x([0-9a-f]+)>", body):
        first, last = start + int(target, 16), int(at, 16)
        if first < last:
            code = [i for i in instructions if first <= i[0] <= last]
            loads = sum("global_load_dwordx4" in text for _, text in code)
            best = max(best, (loads, -len(code), code))
    return best[2]


def write_table(kernels: list[Kernel], path: Path = TABLE) -> None:
    lines = [
        "# The kernels as compiled for gfx90a",
        "",
        "Written by `python -m tests.support.gfx90a` with Debian's hipcc 5.2 (clang 15); a test compiles again and",
        "fails where a kernel spills, needs scratch memory, loses waves or vector accesses, or needs more arithmetic",
        "than here. Nothing in this table was run. Waves are per SIMD, 8 at most. VALU is the part of a GCD's vector",
        "instruction slots that a kernel needs to keep up with a copy at 1.35 TB/s (transcendentals count four): below",
        "1 it can be bound by memory. `-` marks variants for odd widths and alignments, and small helpers.",
        "",
        "| kernel | VGPRs | waves | LDS bytes | 16-byte loads | 16-byte stores | VALU |",
        "|---|---|---|---|---|---|---|",
    ]
    for k in kernels:
        share = "-" if k.share is None else f"{k.share:.2f}"
        lines.append(
            f"| `{k.name}` | {k.vgprs} | {k.waves} | {k.lds} | {k.vector_loads} | {k.vector_stores} | {share} |"
        )
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def read_table(path: Path = TABLE) -> dict[str, tuple[int, int, int, int, int, float | None]]:
    """name -> (VGPRs, waves, LDS bytes, 16-byte loads, 16-byte stores, VALU share) of the committed table."""
    rows = {}
    for line in path.read_text().splitlines():
        if line.startswith("| `"):
            name, *numbers, share = (cell.strip() for cell in line.strip("|").split("|"))
            counts = tuple(int(n) for n in numbers)
            rows[name.strip("`")] = (*counts, None if share == "-" else float(share))
    return rows  # type: ignore[return-value]


if __name__ == "__main__":
    compiled = compile_all()
    write_table(compiled)
    print(json.dumps([asdict(k) for k in compiled if k.spills or k.scratch]))
