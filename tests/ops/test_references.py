"""The PyTorch references: gradients in fp64, agreement with transformers, and the limits of each contract."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops import add_rms_norm, apply_rotary, cpu_blocks, rms_norm, swiglu, vocab_parallel_cross_entropy

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[1, 1 << 17], ids=["one row per block", "default blocks"], autouse=True)
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_blocks, "BLOCK_ELEMENTS", request.param)


def tables(positions: int, half: int) -> tuple[Tensor, Tensor]:
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), 10000.0 ** -(torch.arange(half) / half))
    return angle.cos().float(), angle.sin().float()


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("hf_rounding", [False, True])
def test_norm_gradients(hf_rounding: bool) -> None:
    x, residual, weight = double(2, 3, 7), double(2, 3, 7), double(7)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5, hf_rounding), (x, weight))
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm(x, r, w, 1e-5, hf_rounding), (x, residual, weight))


@pytest.mark.parametrize("used", [0, 1])
def test_add_norm_with_one_result_unused(used: int) -> None:
    x, residual, weight = double(3, 7), double(3, 7), double(7)
    inputs = (x, residual, weight) if used else (x, residual)
    assert torch.autograd.gradcheck(lambda x, r, *w: add_rms_norm(x, r, *(w or (weight,)), 1e-5)[used], inputs)


@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
@pytest.mark.parametrize("half", [1, 4])
def test_rotary_gradients(heads: tuple[int, int], half: int) -> None:
    q, k = double(5, 2, heads[0], 2 * half), double(5, 2, heads[1], 2 * half)
    cos, sin = (t.double() for t in tables(9, half))
    positions = torch.randint(0, 9, (2, 5))
    for where in (None, positions):
        assert torch.autograd.gradcheck(lambda q, k, where=where: apply_rotary(q, k, cos, sin, where), (q, k))


def test_swiglu_gradients() -> None:
    assert torch.autograd.gradcheck(swiglu, double(2, 3, 14))


@pytest.mark.parametrize("width", [5, 11])
def test_cross_entropy_gradients(width: int) -> None:
    labels = torch.tensor([[0, 4, -100], [2, -100, 1]])
    loss = lambda x: vocab_parallel_cross_entropy(x, labels, None, 0, width)  # noqa: E731
    assert torch.autograd.gradcheck(loss, double(2, 3, 11))


@pytest.mark.parametrize("width", [63, 64, 4096])
def test_norm_rounds_as_hugging_face(width: int) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = torch.randn(300, width).bfloat16()
    norm = LlamaRMSNorm(width, eps=1e-5).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(torch.rand(width) + 0.5)
    expected = norm(x)
    assert torch.equal(rms_norm(x, norm.weight, 1e-5, hf_rounding=True), expected)
    assert not torch.equal(rms_norm(x, norm.weight, 1e-5), expected)
    total, y = add_rms_norm(x, x.flip(0), norm.weight, 1e-5, hf_rounding=True)
    assert torch.equal(total, x + x.flip(0))
    assert torch.equal(y, norm(total))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_add_equals_the_two_operations(dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 40, 96).to(dtype).unbind(0)
    weight = torch.rand(96).to(dtype)
    total, y = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(total, weight, 1e-5))


def test_rotary_is_that_of_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    packed = torch.randn(6, 2, (4 + 2 * 2) * 16)
    q, k, _ = packed.unflatten(-1, (8, 16)).split((4, 2, 2), -2)
    cos, sin = tables(10, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [4, 5, 6, 7, 8, 9]])
    turned = apply_rotary(q, k, cos, sin, positions)
    full = [torch.cat((t, t), -1)[positions.t()] for t in (cos, sin)]
    expected = apply_rotary_pos_emb(q, k, *full, unsqueeze_dim=2)
    for ours, theirs in zip(turned, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-6
    plain = apply_rotary(q, k, cos, sin)
    assert torch.equal(plain[0], apply_rotary(q, k, cos, sin, torch.arange(6).expand(2, 6))[0])
    assert not torch.equal(plain[0], turned[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_few_rows_take_a_shorter_way_to_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generation uses one block without gradients; it equals the same rows in blocks of one."""
    x, weight, fused = (torch.randn(*shape).to(dtype) for shape in ((3, 4, 48), (48,), (3, 4, 88)))
    with torch.no_grad():
        short = rms_norm(x, weight, 1e-5), *add_rms_norm(x, x.flip(0), weight, 1e-5), swiglu(fused)
        monkeypatch.setattr(cpu_blocks, "BLOCK_ELEMENTS", 48)
        blocks = rms_norm(x, weight, 1e-5), *add_rms_norm(x, x.flip(0), weight, 1e-5), swiglu(fused)
    assert [torch.equal(a, b) for a, b in zip(short, blocks, strict=True)] == [True] * 4
    assert {a.dtype for a in short} == {dtype}


def test_swiglu_reads_up_first() -> None:
    fused = torch.randn(3, 8)
    assert torch.allclose(swiglu(fused), F.silu(fused[:, 4:]) * fused[:, :4])


def test_cross_entropy_is_that_of_torch() -> None:
    logits = torch.randn(50, 200, requires_grad=True)
    labels = torch.randint(0, 200, (50,))
    labels[::7] = -100
    ours = vocab_parallel_cross_entropy(logits, labels, None, 0, 200)
    theirs = F.cross_entropy(logits, labels, reduction="none")
    assert (ours - theirs).abs().max() < 1e-5
    grads = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, theirs)]
    assert (grads[0] - grads[1]).abs().max() < 1e-6


def test_cross_entropy_ignores_padding_and_masked_rows() -> None:
    logits = torch.randn(6, 16).bfloat16()
    labels = torch.tensor([1, -100, 9, 3, -100, 0])
    dirty = logits.clone()
    dirty[:, 10::2], dirty[:, 11::2] = torch.inf, -torch.inf
    results = []
    for x in (logits, dirty):
        x.requires_grad_()
        loss = vocab_parallel_cross_entropy(x, labels, None, 0, 10)
        assert loss.dtype == torch.float32
        loss.sum().backward()
        results.append((loss.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    loss, grad = results[1]
    assert torch.equal(loss == 0, labels == -100)
    assert not grad[:, 10:].any()
    assert not grad[labels == -100].any()
    everything = vocab_parallel_cross_entropy(dirty, torch.full((6,), -100), None, 0, 10)
    assert not everything.any()


def test_cross_entropy_shouts_at_a_label_outside_the_vocabulary() -> None:
    loss = vocab_parallel_cross_entropy(torch.randn(3, 16), torch.tensor([2, 12, 99]), None, 0, 10)
    assert loss[0].isfinite()
    assert loss[1:].isinf().all()


def test_gradient_of_a_confident_bf16_row_is_rounded_once() -> None:
    logits = torch.tensor([[8.0, 0.0, 0.0]]).bfloat16().requires_grad_()
    vocab_parallel_cross_entropy(logits, torch.tensor([0]), None, 0, 3).sum().backward()
    exact = torch.softmax(logits.detach().double(), -1) - torch.tensor([1.0, 0, 0])
    assert torch.equal(logits.grad, exact.bfloat16())


@pytest.mark.parametrize(
    "call",
    [
        lambda: rms_norm(torch.ones(2, 3), torch.ones(4), 1e-5),
        lambda: add_rms_norm(torch.ones(2, 3), torch.ones(3, 3), torch.ones(3), 1e-5),
        lambda: swiglu(torch.ones(2, 3)),
        lambda: apply_rotary(torch.ones(4, 1, 1, 8), torch.ones(4, 1, 1, 8), *tables(3, 4)),
        lambda: apply_rotary(torch.ones(2, 1, 1, 8), torch.ones(2, 1, 1, 8), *tables(3, 8)),
        lambda: apply_rotary(torch.ones(2, 1, 1, 8), torch.ones(2, 1, 1, 8), *tables(3, 3)),
        lambda: apply_rotary(torch.ones(2, 1, 1, 8), torch.ones(2, 1, 1, 8), *tables(3, 4), torch.zeros(2, 1)),
        lambda: vocab_parallel_cross_entropy(torch.ones(2, 3), torch.zeros(3), None, 0, 3),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call: object) -> None:
    with pytest.raises(ValueError, match=r"expected|give|must|need|raise"):
        call()
