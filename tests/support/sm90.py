"""The kernels as nvcc compiles them for H100 and H200: registers, spills, bytes in flight per multiprocessor.

`python -m tests.support.sm90` prints the table of docs/kernels.md. Nothing here runs on a GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megatron.ops.build import KERNEL_FILES, SOURCES, Target, compile_command

REGISTERS = 65536  # per multiprocessor
MOST_THREADS = 2048
# In bf16 at Llama-3.1-8B's width: threads per block, 16-byte loads issued by a thread before it uses the first.
HOT = {
    "rms_norm_forward<bf16, 32, 4, 4, false, false>": (256, 4),
    "rms_norm_forward<bf16, 32, 4, 4, true, false>": (256, 8),
    "rms_norm_backward<bf16, 32, 2, 8, false, false>": (256, 4),
    "rms_norm_backward<bf16, 32, 2, 8, true, false>": (256, 6),
    "rotary<bf16, 8>": (256, 4),
    "swiglu_forward<bf16, 8>": (256, 2),
    "swiglu_backward<bf16, 8>": (256, 3),
    "cross_entropy_stats<bf16, 32, 8>": (256, 4),
    "cross_entropy_gradient<bf16, 8>": (256, 2),
}


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int
    spilled: int  # bytes

    @property
    def resident(self) -> int:
        """Resident threads per multiprocessor, limited by registers."""
        threads, _ = HOT[self.name]
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * threads)
        return min(by_registers, MOST_THREADS // threads) * threads

    @property
    def in_flight(self) -> int:
        """Bytes in flight per multiprocessor."""
        return self.resident * HOT[self.name][1] * 16


def compile_all(folder: Path) -> dict[str, Kernel]:
    """Every kernel instantiation by name; RuntimeError with nvcc's output if one does not compile."""
    jobs = []
    for name in KERNEL_FILES:
        command = [*compile_command(Target("cuda", ("sm_90",))), "-Xptxas", "-v", "-cubin"]
        command += [str(SOURCES / f"{name}.cu"), "-o", str(folder / name)]
        jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    kernels = {}
    for job in jobs:
        said = job.communicate()[1]
        if job.returncode:
            raise RuntimeError(said)
        plain = subprocess.run(["c++filt"], input=said, capture_output=True, text=True, check=True).stdout
        for entry in plain.split("Compiling entry function '")[1:]:
            name = re.sub(r"neox::|\(anonymous namespace\)::|^void ", "", entry.split("' for")[0])
            numbers = re.search(r"(\d+) bytes spill.*?Used (\d+) registers", entry, re.DOTALL)
            assert numbers, entry
            name = re.sub(r"\(.*", "", name)
            kernels[name] = Kernel(name, registers=int(numbers[2]), spilled=int(numbers[1]))
    return kernels


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        compiled = compile_all(Path(place))
    for name in HOT:
        kernel = compiled[name]
        print(f"| `{name}` | {kernel.registers} | {kernel.resident} | {kernel.in_flight // 1024} |")
