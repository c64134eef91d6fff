"""The torch side: registration, gradients through the compiled operators, choice of implementation, building."""

from __future__ import annotations

import multiprocessing
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron import ops
from megatron.ops import build, choose, kernel_checks, library, selftest

pytestmark = pytest.mark.kernels

raw = torch.ops.neox
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _auto() -> Iterator[None]:
    torch.manual_seed(0)
    library.load_library("cpu")
    yield
    ops.configure("auto")


def arguments(grad: bool) -> dict[str, tuple[object, ...]]:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, requires_grad=grad)

    tables = kernel_checks.rotary_tables(9, 4, CPU)
    labels = torch.tensor([0, 5, -100])
    norm = (random(3, 64), random(64), 1e-5, False)
    return {
        "rms_norm": norm,
        "add_rms_norm": (random(3, 64), *norm),
        "rotary": (random(5, 2, 3, 8), random(5, 2, 1, 8), *tables, torch.randint(0, 9, (2, 5)), False),
        "swiglu": (random(2, 3, 16),),
        "cross_entropy": (random(3, 24), torch.rand(2, 3, 3), labels, 0, 20, -100, False),
    } | (
        {}
        if grad
        else {
            "rms_norm_backward": (random(3, 64), random(3, 64), random(64), torch.rand(3), random(3, 64), False),
            "swiglu_backward": (random(3, 8), random(3, 16)),
            "cross_entropy_stats": (random(3, 24), labels, 0, 20),
            "cross_entropy_gradient": (random(3, 24), labels, torch.rand(3), torch.rand(3), 0, 20, -100),
            "cross_entropy_gradient_": (random(3, 24), labels, torch.rand(3), torch.rand(3), 0, 20, -100),
        }
    )


@pytest.mark.parametrize(("name", "grad"), [(n, g) for g in (False, True) for n in arguments(g)])
def test_registration(name: str, grad: bool) -> None:
    torch.library.opcheck(getattr(raw, name).default, arguments(grad)[name])


def through_public_functions() -> list[Tensor]:
    """Results and gradients of all five functions on one input."""
    torch.manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, requires_grad=True)

    x, residual, weight = random(4, 3, 64), random(4, 3, 64), random(64)
    total, y = ops.add_rms_norm(ops.rms_norm(x, weight, 1e-5), residual, weight, 1e-5)
    packed = random(4, 3, 8 * 16)
    q, k, v = packed.unflatten(-1, (8, 16)).split((4, 2, 2), -2)
    q, k = ops.apply_rotary(q, k, *kernel_checks.rotary_tables(4, 8, CPU))
    fused, logits = random(4, 3, 40), random(4, 3, 50)
    labels = torch.randint(0, 45, (4, 3))
    labels[1] = -100
    loss = ops.vocab_parallel_cross_entropy(logits, labels, None, 0, 45)
    results = [total, y, q, k, ops.swiglu(fused), loss]
    weights = [torch.randn(r.shape) for r in [*results, v]]
    scalar = sum((r * w).sum() for r, w in zip([*results, v], weights, strict=True))
    leaves = [x, residual, weight, packed, fused, logits]
    return results + list(torch.autograd.grad(scalar, leaves))


def test_required_and_reference_agree() -> None:
    ops.configure("reference")
    references = through_public_functions()
    assert "host emulator" in ops.configure("required")
    for emulated, reference in zip(through_public_functions(), references, strict=True):
        assert emulated.dtype == reference.dtype
        assert emulated.shape == reference.shape
        assert (emulated - reference).abs().max() < 1e-5
    assert any(not torch.equal(a, b) for a, b in zip(through_public_functions(), references, strict=True))


@pytest.mark.parametrize("mode", ["reference", "required"])
def test_functions_trace_without_a_graph_break(mode: str) -> None:
    ops.configure(mode)
    cos, sin = kernel_checks.rotary_tables(4, 8, CPU)
    labels = torch.tensor([3, -100, 29])

    def step(x: Tensor, weight: Tensor, fused: Tensor, q: Tensor) -> Tensor:
        total, y = ops.add_rms_norm(ops.rms_norm(x, weight, 1e-5), x, weight, 1e-5)
        q, k = ops.apply_rotary(*q.split(1, 2), cos, sin)
        loss = ops.vocab_parallel_cross_entropy(fused, labels, None, 0, 30)
        return total.sum() + (y * y).sum() + ops.swiglu(fused).sum() + (q * k.cos()).sum() + loss.sum()

    leaves = [torch.randn(s, requires_grad=True) for s in ((3, 64), (64,), (3, 32), (4, 1, 2, 16))]
    expected = torch.autograd.grad(step(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(compiled, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_auto_is_the_reference_on_the_cpu_and_says_so() -> None:
    assert ops.configure("auto") == "fused ops on cpu: PyTorch references (the CPU has no kernels)"
    with pytest.raises(ValueError, match="auto, reference, required"):
        ops.configure("always")


def test_required_refuses_what_has_no_kernel() -> None:
    ops.configure("required")
    x = torch.randn(2, 8, dtype=torch.float64)
    with pytest.raises(library.KernelsUnavailable, match=r"rms_norm: no kernel for torch\.float64"):
        ops.rms_norm(x, x[0], 1e-5)
    with pytest.raises(library.KernelsUnavailable, match="bf16, fp16, fp32"):
        ops.rms_norm(x.bfloat16(), x[0].float(), 1e-5)


def test_a_device_that_nothing_was_chosen_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ops.configure("auto", "cpu")
    assert not library.use_kernels("swiglu", torch.ones(1, device="meta"))
    assert "swiglu: PyTorch reference (nothing was chosen for meta)" in caplog.text
    ops.configure("required", "cpu")
    with pytest.raises(library.KernelsUnavailable, match=r"nothing was chosen for meta; call megatron\.ops\.configure"):
        library.use_kernels("swiglu", torch.ones(1, device="meta"))
    monkeypatch.setattr(library, "state", library.LibraryState())
    assert not library.use_kernels("swiglu", torch.ones(1)), "the CPU needs no choice"


def test_a_failed_build_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library.state, "libraries", {})
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setenv("NEOX_CACHE", str(tmp_path))
    with pytest.raises(library.KernelsUnavailable, match="ninja is not on PATH"):
        ops.configure("required")
    monkeypatch.setattr(library, "PACKAGED_LIBRARY", tmp_path / "absent")
    assert "setup.py build_ext" in ops.configure("auto", "cuda")


@pytest.mark.parametrize(
    ("device", "built", "wrong", "verdict"),
    [
        ("gfx90a:sramecc+:xnack-", ["gfx90a", "gfx942"], [], None),
        ("gfx1100", ["gfx90a", "gfx942"], [], "this GPU is gfx1100, the kernels are for gfx90a, gfx942"),
        ("gfx90a:sramecc+:xnack-", ["gfx90a"], ["rms_norm dx"], "failed their self-test on this GPU: rms_norm dx"),
    ],
)
def test_a_gpu_gets_kernels_only_if_they_fit_and_work(
    monkeypatch: pytest.MonkeyPatch, device: str, built: list[str], wrong: list[str], verdict: str | None
) -> None:
    monkeypatch.setattr(library, "load_library", lambda _: None)
    monkeypatch.setattr(library, "architectures", lambda _: built)
    monkeypatch.setattr(choose, "failed_checks", lambda _: wrong)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(gcnArchName=device))
    said = ops.configure("auto", "cuda")
    assert (verdict or "compiled kernels (gfx90a, gfx942)") in said
    if verdict:
        with pytest.raises(library.KernelsUnavailable, match=verdict):
            ops.configure("required", "cuda")


def test_the_self_test_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_checks.failed_checks(CPU) == []

    class Wrong:
        def __getattr__(self, name: str) -> object:
            return getattr(raw, name)

        @staticmethod
        def rms_norm_backward(*args: object) -> tuple[Tensor, Tensor]:
            dx, dw = raw.rms_norm_backward(*args)
            return dx, torch.where(torch.arange(len(dw)) == 17, dw * 1.01, dw)  # the loss would not show it

    monkeypatch.setattr(kernel_checks, "kernels", Wrong())
    failed = kernel_checks.failed_checks(CPU)
    assert failed
    assert all(re.match(r"(add_)?rms_norm dweight in torch", line) for line in failed)
    assert selftest.main(["--device", "cpu"]) == 1


@pytest.mark.parametrize("mode", ["reference", "required"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overwritten_logits_hold_the_gradient(mode: str, dtype: torch.dtype) -> None:
    ops.configure(mode)
    source, labels = torch.randn(3, 2, 40).to(dtype), torch.randint(0, 30, (3, 2))
    grads = []
    for overwrite in (False, True):
        leaf = source.clone().requires_grad_()
        logits = leaf * 1
        loss = ops.vocab_parallel_cross_entropy(logits, labels, None, 0, 30, overwrite_logits=overwrite)
        loss.sum().backward(retain_graph=True)
        grads.append(leaf.grad)
        assert torch.equal(logits.detach(), leaf.grad if overwrite else source)
    assert torch.equal(*grads)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()
    with pytest.raises(ValueError, match="contiguous"):
        ops.vocab_parallel_cross_entropy(logits[..., ::2], labels, None, 0, 30, overwrite_logits=True)


def _build_once(folder: str, log: str) -> str:
    import os
    from unittest import mock

    def slow_build(target: build.Target, where: Path) -> Path:
        with open(log, "a") as out:
            out.write(f"{os.getpid()}\n")
        where.mkdir(parents=True)
        (where / build.LIBRARY_NAME).write_text("complete")
        return where / build.LIBRARY_NAME

    with mock.patch.dict(os.environ, NEOX_CACHE=folder), mock.patch.object(build, "build_library", slow_build):
        return build.cached_library(build.Target("emulator")).read_text()


def test_many_processes_build_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with multiprocessing.get_context("fork").Pool(8) as pool:
        results = pool.starmap(_build_once, [(str(tmp_path / "cache"), str(log))] * 8)
    assert results == ["complete"] * 8
    assert len(log.read_text().splitlines()) == 1


def test_architectures_of_one_library_share_a_wave_size() -> None:
    assert build.Target("rocm", ("gfx90a", "gfx942")).wave_size == 64
    assert build.Target("cuda", ("sm_90",)).wave_size == 32
    with pytest.raises(build.BuildError, match="wave size"):
        _ = build.Target("rocm", ("gfx90a", "gfx1100")).wave_size
    with pytest.raises(build.BuildError, match="gfx90a or sm_90"):
        _ = build.Target("rocm", ("mi250",)).wave_size


def test_sources_know_no_lane_count() -> None:
    """Assuming 32 lanes on 64-lane hardware is the classic bug of ported kernels."""
    kernels_and_platform = [*build.SOURCES.glob("*.cu"), build.SOURCES / "platform.h"]
    for path in kernels_and_platform:
        code = re.sub(r"//.*", "", path.read_text()).split("#if defined(NEOX_HOST_EMULATOR)\n\nextern")[0]
        assert not re.search(r"\bwarpSize\b|0x[fF]{8}\b|__ballot|__activemask|atomic", code), path
        named = re.sub(r"kReduceColumns = 32|kReduceRows = 32|amdgcn_\w+", "", code)
        assert re.findall(r"[^\w.](?:32|64|31|63)\b", named) == [], path
