"""Accuracy checks of the kernels, shared by the self-test and the emulator tests.

The ground truth is the reference in fp64. In each row, a kernel's error may be at most twice that of plain PyTorch in
the same dtype. Where PyTorch happens to be exact, as on a row of one element, the bound is the unavoidable error: one
rounding of the result, or a few fp32 roundings of the terms that were summed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.ops.cross_entropy import combine_stats, reference_gradient, reference_stats
from megatron.ops.library import KERNEL_DTYPES
from megatron.ops.rms_norm import reference_norm, reference_norm_backward
from megatron.ops.rotary import reference_rotate, tables_of_tokens
from megatron.ops.swiglu import reference_swiglu, reference_swiglu_backward

FP32_EPS = torch.finfo(torch.float32).eps
kernels = torch.ops.neox


@dataclass(frozen=True)
class Check:
    """One result of the kernel, of plain PyTorch and in fp64; `terms` is the size of its summands, which may cancel."""

    name: str
    kernel: Tensor
    plain: Tensor
    exact: Tensor
    terms: Tensor

    def excess(self) -> float:
        """Largest error as a fraction of the allowed error; above 1, or NaN, the kernel is wrong."""
        if self.kernel.numel() == 0:
            return 0.0
        kernel, plain, exact = (_rows(t.double()) for t in (self.kernel, self.plain, self.exact))
        odd = ~exact.isfinite()
        if not torch.equal(torch.where(odd, kernel, 0.0).nan_to_num(), torch.where(odd, exact, 0.0).nan_to_num()):
            return float("nan")
        error, own = ((t - exact).masked_fill(odd, 0).abs().amax(1) for t in (kernel, plain))
        rounding = torch.finfo(self.kernel.dtype).eps * exact.masked_fill(odd, 0).abs().amax(1)
        terms = 4 * FP32_EPS * _rows(self.terms.double()).expand_as(exact).amax(1)
        allowed = torch.stack((2 * own, rounding, terms)).amax(0) + torch.finfo(self.kernel.dtype).tiny
        return float((error / allowed).max())


def _rows(t: Tensor) -> Tensor:
    return t.reshape(1, -1) if t.dim() < 2 else t.reshape(-1, t.shape[-1])


def equal(name: str, kernel: Tensor, expected: Tensor) -> Check:
    """A check that requires bit-equal results."""
    wrong = (kernel != expected).double()
    zero = torch.zeros_like(wrong)
    return Check(name, wrong, zero, zero, zero)


def norm_checks(
    x: Tensor, weight: Tensor, dy: Tensor, eps: float, residual: Tensor | None = None, dsum: Tensor | None = None
) -> Iterator[Check]:
    """Check RMSNorm of `x` [rows, width], or of x + residual, forward and backward."""
    if residual is None:
        y, rstd = kernels.rms_norm(x, weight, eps, False)
        total = x
    else:
        total, y, rstd = kernels.add_rms_norm(x, residual, weight, eps, False)
        yield equal("sum", total, x + residual)
    x64, w64, dy64 = total.double(), weight.double(), dy.double()
    plain_y, plain_rstd = reference_norm(total, weight, eps, False)
    exact_y, exact_rstd = reference_norm(x64, w64, eps, False)
    yield Check("y", y, plain_y, exact_y, exact_y.abs())
    yield Check("rstd", rstd[:, None], plain_rstd[:, None], exact_rstd[:, None], exact_rstd[:, None])
    dx, dw = kernels.rms_norm_backward(dy, total, weight, rstd, dsum, False)
    plain = reference_norm_backward(dy, total, weight, plain_rstd, dsum, False)
    exact = reference_norm_backward(dy64, x64, w64, exact_rstd, None if dsum is None else dsum.double(), False)
    product = (dy64 * x64 * exact_rstd[:, None]).abs()
    straight = (dy64 * w64).abs() * exact_rstd[:, None]
    mean = (product * w64.abs()).mean(1, keepdim=True)
    extra = 0 if dsum is None else dsum.double().abs()
    yield Check("dx", dx, plain[0], exact[0], straight + (x64 * exact_rstd[:, None] ** 2).abs() * mean + extra)
    columns = (t[:, None] for t in (dw, plain[1], exact[1], product.sum(0)))  # each column has its own bound
    yield Check("dweight", *columns)
    again = kernels.rms_norm_backward(dy, total, weight, rstd, dsum, False)[1]
    yield equal("dweight, second run", again, dw)


def rotary_checks(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> Iterator[Check]:
    """Check the rotation of q and k, and its inverse."""
    tables = [tables_of_tokens(cos, sin, positions, q.shape[0], t) for t in (q, q.double())]
    for conjugate in (False, True):
        turned = kernels.rotary(q, k, cos, sin, positions, conjugate)
        for name, x, result in zip("qk", (q, k), turned, strict=True):
            plain = reference_rotate(x, *tables[0], conjugate)
            exact = reference_rotate(x.double(), *tables[1], conjugate)
            yield Check(f"{name}{' back' if conjugate else ''}", result, plain, exact, exact.abs())


def swiglu_checks(fused: Tensor, dout: Tensor) -> Iterator[Check]:
    """Check SwiGLU of `fused` [rows, 2 F], and its gradient."""
    exact = reference_swiglu(fused.double())
    yield Check("out", kernels.swiglu(fused), reference_swiglu(fused), exact, exact.abs())
    exact = reference_swiglu_backward(dout.double(), fused.double())
    result = kernels.swiglu_backward(dout, fused)
    yield Check("dfused", result, reference_swiglu_backward(dout, fused), exact, exact.abs())


def cross_entropy_checks(
    logits: Tensor, labels: Tensor, dloss: Tensor, vocab_start: int, width: int, ignore_index: int = -100
) -> Iterator[Check]:
    """Check statistics, loss and gradient of one rank's logits [rows, columns], of which `width` are true columns."""

    def plain(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        local = labels - vocab_start
        stats = reference_stats(x, local, width)
        loss, lse = combine_stats(stats[None], labels, ignore_index)
        scale = dloss.to(lse.dtype).masked_fill(labels == ignore_index, 0)
        return loss, lse, reference_gradient(x, local, lse, scale, width, torch.empty_like(x))

    stats = kernels.cross_entropy_stats(logits, labels, vocab_start, width)
    loss, lse = kernels.cross_entropy(logits, stats[None], labels, vocab_start, width, ignore_index, False)
    own, exact = plain(logits), plain(logits.double())
    size = exact[1].abs() + logits[:, :width].double().abs().masked_fill(logits[:, :width].isinf(), 0).amax(1)
    yield Check("loss", loss[:, None], own[0][:, None], exact[0][:, None], size[:, None])
    yield Check("log-sum-exp", lse[:, None], own[1][:, None], exact[1][:, None], size[:, None])
    arguments = (labels, lse, dloss, vocab_start, width, ignore_index)
    gradient = kernels.cross_entropy_gradient(logits, *arguments)
    terms = (dloss.double().abs()[:, None] + exact[2].abs() * size[:, None]) / 4
    yield Check("gradient", gradient, own[2], exact[2], terms)
    overwritten = logits.clone()
    kernels.cross_entropy_gradient_(overwritten, *arguments)
    yield equal("gradient in place", overwritten, gradient)
    yield equal("gradient of padding", gradient[:, width:], torch.zeros_like(gradient[:, width:]))


def rotary_tables(positions: int, half: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """fp32 cosines and sines [positions, half] of the usual frequencies, from fp64 angles."""
    frequency = 500000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), frequency)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def operator_checks(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Check]]:
    """(operator, check) for every operator, in shapes for vector and scalar kernels and for several rows per group."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    for rows, width in ((7, 4096), (70, 1024), (5, 63)):
        x, dy, residual, dsum = (random(rows, width) for _ in range(4))
        for check in norm_checks(x, random(width), dy, 1e-5):
            yield "rms_norm", check
        for check in norm_checks(x, random(width), dy, 1e-5, residual, dsum):
            yield "add_rms_norm", check
    for d in (128, 6):
        packed = random(9, 2, (4 + 2 * 2) * d)
        q, k, _ = packed.unflatten(-1, (8, d)).split((4, 2, 2), -2)
        positions = torch.randint(0, 50, (2, 9), generator=generator).to(device)
        for check in rotary_checks(q, k, *rotary_tables(50, d // 2, device), positions):
            yield "rotary", check
    for rows, width in ((7, 1792), (5, 33)):
        for check in swiglu_checks(random(rows, 2 * width), random(rows, width)):
            yield "swiglu", check
    for columns, width in ((16032, 16000), (777, 777)):
        logits, dloss = random(6, columns) * 4, torch.rand(6, generator=generator).to(device)
        labels = torch.tensor([3, 5 + width // 2, -100, 4, 2 + width, 9]).to(device)
        for check in cross_entropy_checks(logits, labels, dloss, 3, width):
            yield "cross_entropy", check


def failed_checks(device: torch.device) -> list[str]:
    """One line for every wrong result of the loaded kernels; empty if all are right."""
    failed = []
    for dtype in KERNEL_DTYPES:
        for op, check in operator_checks(device, dtype):
            excess = check.excess()
            if not excess <= 1:
                failed.append(f"{op} {check.name} in {dtype}: {excess:.3g} times the allowed error")
    return failed
