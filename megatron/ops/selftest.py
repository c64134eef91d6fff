"""Tests the kernels on this machine: `python -m megatron.ops.selftest`.

Compares every operator with fp64, then its bandwidth with that of a copy in the same run. Exit code 1 if a kernel is
wrong, 2 if there are no kernels. Without a GPU it tests the host emulator, and measures no bandwidth.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron.ops.bandwidth import Clock
from megatron.ops.kernel_checks import failed_checks, rotary_tables
from megatron.ops.library import KernelsUnavailable, architectures, load_library

kernels = torch.ops.neox


def bandwidths(device: torch.device) -> Iterator[tuple[str, float]]:
    """(operator, bytes per second), counting the bytes it must move, for 8192 tokens of Llama-3.1-8B in bf16."""
    clock = Clock(device)
    yield "copy", clock.copy_bandwidth()
    rows, hidden, ffn, vocabulary = 8192, 4096, 14336, 128256

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    x, dy, residual, dsum, weight = *(random(rows, hidden) for _ in range(4)), random(hidden)
    _, rstd = kernels.rms_norm(x, weight, 1e-5, False)
    fused, dout = random(rows, 2 * ffn), random(rows, ffn)
    q, k, _ = random(rows, 1, 48 * 128).unflatten(-1, (48, 128)).split((32, 8, 8), -2)
    tables = rotary_tables(rows, 64, device)
    logits, labels = random(rows, vocabulary), torch.randint(0, vocabulary, (rows,), device=device)
    stats = kernels.cross_entropy_stats(logits, labels, 0, vocabulary)
    _, lse = kernels.cross_entropy(logits, stats[None], labels, 0, vocabulary, -100, False)
    dloss = torch.ones_like(lse)
    for name, elements, size, function in (
        ("rms_norm", x.numel(), 4, lambda: kernels.rms_norm(x, weight, 1e-5, False)),
        ("rms_norm backward", x.numel(), 6, lambda: kernels.rms_norm_backward(dy, x, weight, rstd, None, False)),
        ("add_rms_norm", x.numel(), 8, lambda: kernels.add_rms_norm(x, residual, weight, 1e-5, False)),
        ("add_rms_norm backward", x.numel(), 8, lambda: kernels.rms_norm_backward(dy, x, weight, rstd, dsum, False)),
        ("rotary", q.numel() + k.numel(), 4, lambda: kernels.rotary(q, k, *tables, None, False)),
        ("swiglu", dout.numel(), 6, lambda: kernels.swiglu(fused)),
        ("swiglu backward", dout.numel(), 10, lambda: kernels.swiglu_backward(dout, fused)),
        ("cross_entropy", logits.numel(), 2, lambda: kernels.cross_entropy_stats(logits, labels, 0, vocabulary)),
        (
            "cross_entropy gradient",
            logits.numel(),
            4,
            lambda: kernels.cross_entropy_gradient_(logits, labels, lse, dloss, 0, vocabulary, -100),
        ),
    ):
        yield name, elements * size / clock.time(function).median


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron.ops.selftest", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    asked = parser.parse_args(arguments).device
    kind = asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind)
    try:
        load_library(kind)
    except KernelsUnavailable as error:
        print(f"no kernels: {error}", file=sys.stderr)
        return 2
    where = torch.cuda.get_device_name() if kind == "cuda" else "the CPU"
    print(f"kernels for {', '.join(architectures(kind))} on {where}")
    failed = failed_checks(device)
    for line in failed:
        print(f"WRONG {line}")
    if not failed:
        print("every operator is right: rms_norm, add_rms_norm, rotary, swiglu, cross_entropy in bf16, fp16 and fp32")
    if kind == "cuda":
        copy = 0.0
        for name, rate in bandwidths(device):
            copy = copy or rate
            print(f"{name:24s} {rate / 1e9:7.0f} GB/s  {rate / copy:5.2f} of copy")
    else:
        print("no bandwidths: the emulator runs on the CPU; run this on a machine with a GPU")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
