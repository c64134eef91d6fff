"""The kernels' sources, run on the host emulator with waves of 32 and 64 lanes, equal fp64 within rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import Tensor

from megatron.ops import kernel_checks
from megatron.ops.kernel_checks import Check, rotary_tables
from tests.support.emulator import compute_units, launches, set_emulated_wave

pytestmark = pytest.mark.kernels

ops = torch.ops.neox
WIDTHS = (1, 7, 63, 64, 65, 128, 2048, 4095, 4096, 8192)
ROWS = (1, 2, 7)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(params=[32, 64], ids=["wave32", "wave64"], autouse=True)
def _wave(request: pytest.FixtureRequest) -> Iterator[None]:
    set_emulated_wave(request.param)
    torch.manual_seed(0)
    yield
    set_emulated_wave(64)


@pytest.fixture(params=DTYPES, ids=["bf16", "fp16", "fp32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def judge(checks: Iterable[Check], case: object) -> None:
    wrong = [f"{check.name}: {check.excess():.3g}" for check in checks if not check.excess() <= 1]
    assert not wrong, f"{case}: times the allowed error: {wrong}"


def large_mean(x: Tensor) -> Tensor:
    return x + 100


def one_outlier(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, x.shape[1] // 2] = 1e3
    return x


def near_epsilon(x: Tensor) -> Tensor:
    return x * 3e-3


def a_zero_row(x: Tensor) -> Tensor:
    x = x.clone()
    x[0] = 0
    return x


INPUTS: tuple[Callable[[Tensor], Tensor], ...] = (lambda x: x, large_mean, one_outlier, near_epsilon, a_zero_row)


def norms(rows: int, width: int, dtype: torch.dtype, change: Callable[[Tensor], Tensor] = INPUTS[0]) -> None:
    x, dy, residual, dsum = torch.randn(4, rows, width).unbind(0)
    x, dy, residual, dsum = change(x).to(dtype), dy.to(dtype), residual.to(dtype), dsum.to(dtype)
    weight = torch.randn(width).to(dtype)
    judge(kernel_checks.norm_checks(x, weight, dy, 1e-5), ("norm", rows, width))
    judge(kernel_checks.norm_checks(x, weight, dy, 1e-5, residual, dsum), ("add + norm", rows, width))


@pytest.mark.parametrize("width", WIDTHS)
def test_norm(width: int, dtype: torch.dtype) -> None:
    for rows in ROWS:
        norms(rows, width, dtype)


@pytest.mark.parametrize(
    "width", [64, 520, 16400, *(pytest.param(width, marks=pytest.mark.slow) for width in (16384, 32768))]
)
def test_norm_widths_between_the_row_shapes(width: int, dtype: torch.dtype) -> None:
    norms(3, width, dtype)


def test_norm_with_many_rows_a_group(dtype: torch.dtype) -> None:
    norms(300, 136, dtype)  # several rows per block, an incomplete last group
    norms(300, 65, dtype)


@pytest.mark.parametrize("width", [136, 65])
def test_partial_rows_follow_the_compute_units(width: int) -> None:
    """Few units give groups of many rows, many units as many groups as rows allow; each device is deterministic."""
    x, dy, weight = torch.randn(60, width), torch.randn(60, width), torch.randn(width)
    rstd = ops.rms_norm(x, weight, 1e-5, False)[1]
    sums = []
    for units in (1, 3, 110, 304):
        with compute_units(units):
            judge(kernel_checks.norm_checks(x, weight, dy, 1e-5), units)  # includes that two runs give the same bits
            sums.append(ops.rms_norm_backward(dy, x, weight, rstd, None, False)[1])
    assert not torch.equal(sums[0], sums[2]), "one unit and 110 add in the same order"
    assert torch.equal(sums[2], sums[3]), "four rows a group is the least"


@pytest.mark.parametrize("hf_rounding", [False, True])
@pytest.mark.parametrize("width", [64, 65, 4096, 16400])
def test_launches(width: int, hf_rounding: bool) -> None:
    """One launch forward, two backward: gradients with partial sums, then their sum in the weight's dtype."""
    x, residual, weight = (torch.randn(*s).bfloat16().requires_grad_() for s in ((9, width), (9, width), (width,)))
    results: list[Tensor] = []
    assert launches(lambda: results.extend(ops.rms_norm(x, weight, 1e-5, hf_rounding))) == 1
    assert launches(lambda: results.extend(ops.add_rms_norm(x, residual, weight, 1e-5, hf_rounding))) == 1
    y, _, total, both, _ = results
    assert launches(lambda: y.sum().backward()) == 2
    assert launches(lambda: (total + both).sum().backward()) == 2
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_norm_of_1024_rows(width: int, dtype: torch.dtype) -> None:
    norms(1024, width, dtype)


@pytest.mark.parametrize("change", INPUTS[1:], ids=lambda f: f.__name__)
@pytest.mark.parametrize("width", [1, 65, 2048])
def test_norm_of_difficult_rows(change: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype) -> None:
    norms(7, width, dtype, change)


def test_norm_of_strided_and_unaligned_rows(dtype: torch.dtype) -> None:
    wide = torch.randn(5, 300).to(dtype)
    weight = torch.randn(300).to(dtype)
    for x, w in (
        (wide[:, 8:136], weight[:128]),  # whole vectors, strided rows
        (wide[:, 1:129], weight[:128]),  # rows that do not start on a vector
        (wide[:, :128], weight[3:131]),  # a weight that does not start on a vector
        (wide[:, ::2], weight[::2]),  # strided columns
        (wide[1:2, :128], weight[:128]),  # one row
        (wide[:1, :128].expand(5, 128), weight[:128]),  # one row five times
    ):
        dy = torch.randn(2, *x.shape).to(dtype)[1]
        judge(kernel_checks.norm_checks(x, w, dy, 1e-5, x.flip(0), dy), x.stride())
        judge(kernel_checks.norm_checks(x, w, wide[:, : x.shape[1]][: len(x)], 1e-5), x.stride())
    stack = wide.view(5, 10, 30).transpose(0, 1)
    y = ops.rms_norm(stack, weight[:30], 1e-5, False)[0]
    assert torch.equal(y, ops.rms_norm(stack.contiguous(), weight[:30], 1e-5, False)[0])


def test_hf_rounding_is_the_order_of_hugging_face() -> None:
    x, weight = torch.randn(40, 512).bfloat16(), torch.rand(512).bfloat16()
    y, rstd = ops.rms_norm(x, weight, 1e-5, True)
    in_that_order = weight * (x.float() * rstd[:, None]).bfloat16()
    assert torch.equal(y, in_that_order)
    assert not torch.equal(y, ops.rms_norm(x, weight, 1e-5, False)[0])
    dy = torch.randn(40, 512).bfloat16()
    dw = ops.rms_norm_backward(dy, x, weight, rstd, None, True)[1]
    exact = (dy.double() * (x.float() * rstd[:, None]).bfloat16().double()).sum(0)
    assert torch.equal(dw, exact.bfloat16())
    assert not torch.equal(ops.rms_norm_backward(dy, x, weight, rstd, None, False)[1], exact.bfloat16())


@pytest.mark.parametrize("tp", [1, 8])
@pytest.mark.parametrize("heads", [(32, 8, 128), (64, 8, 128), (32, 8, 64)], ids=["8B", "70B", "1B"])
def test_rotary_of_llama_heads(tp: int, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    q_heads, k_heads, d = heads[0] // tp, heads[1] // tp, heads[2]
    packed = torch.randn(7, 2, (q_heads + 2 * k_heads) * d).to(dtype)
    q, k, _ = packed.unflatten(-1, (q_heads + 2 * k_heads, d)).split((q_heads, k_heads, k_heads), -2)
    tables = rotary_tables(4096, d // 2, torch.device("cpu"))
    judge(kernel_checks.rotary_checks(q, k, *tables, None), heads)
    judge(kernel_checks.rotary_checks(q, k, *tables, torch.randint(0, 4096, (2, 7))), heads)


@pytest.mark.parametrize("d", [16, 6, 2, 96, 80, 40, 512])
def test_rotary_of_odd_heads(d: int, dtype: torch.dtype) -> None:
    packed = torch.randn(5, 3, 3, 3, d + 1).to(dtype)  # q, k, v head by head, one element too wide
    tables = rotary_tables(50, d // 2, torch.device("cpu"))
    positions = torch.randint(0, 50, (5, 3), dtype=torch.int32).t()
    for start in (0, 1):
        q, k = (packed[..., i, start : start + d] for i in (0, 1))
        judge(kernel_checks.rotary_checks(q, k, *tables, positions), (d, start))


@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu(width: int, dtype: torch.dtype) -> None:
    for rows in ROWS:
        fused, dout = torch.randn(rows, 2 * width) * 3, torch.randn(rows, width)
        judge(kernel_checks.swiglu_checks(fused.to(dtype), dout.to(dtype)), (rows, width))


def test_swiglu_of_difficult_and_strided_input(dtype: torch.dtype) -> None:
    fused, dout = torch.randn(6, 400).to(dtype), torch.randn(6, 300).to(dtype)
    fused[0, 100:130], fused[1, 100:130], fused[2, 100:130], fused[3] = 1e3, -1e3, 80, 0
    for start, width in ((0, 128), (1, 128), (8, 64)):
        judge(kernel_checks.swiglu_checks(fused[:, start : start + 2 * width], dout[:, start : start + width]), start)


@pytest.mark.parametrize("width", [*WIDTHS, 16032])
def test_cross_entropy(width: int, dtype: torch.dtype) -> None:
    for rows in ROWS:
        logits = (torch.randn(rows, width) * 4).to(dtype)
        labels = torch.randint(0, width, (rows,)) + 11
        labels[1::3] = -100
        labels[2::3] = width + 11  # on the next rank
        judge(kernel_checks.cross_entropy_checks(logits, labels, torch.rand(rows), 11, width), (rows, width))


@pytest.mark.slow
@pytest.mark.parametrize("width", [4095, 128256])
def test_cross_entropy_of_many_rows(width: int, dtype: torch.dtype) -> None:
    rows = 1024 if width < 5000 else 8
    logits, labels = (torch.randn(rows, width) * 4).to(dtype), torch.randint(0, width, (rows,))
    judge(kernel_checks.cross_entropy_checks(logits, labels, torch.rand(rows), 0, width), (rows, width))


def test_cross_entropy_of_padded_shards(dtype: torch.dtype) -> None:
    labels = torch.tensor([100, 140, -100, 0, 107])
    for columns, width in ((64, 64), (64, 63), (64, 1), (65, 40), (3000, 2049)):
        logits = torch.randn(5, columns).to(dtype)
        logits[:, width::2], logits[:, width + 1 :: 2] = torch.inf, -torch.inf
        before = logits.clone()
        judge(kernel_checks.cross_entropy_checks(logits, labels, torch.rand(5), 100, width), (columns, width))
        assert torch.equal(logits, before)
        shifted = torch.randn(5, columns + 1).to(dtype)[:, 1:]
        judge(
            kernel_checks.cross_entropy_checks(shifted, labels, torch.rand(5), 100, width), (columns, width, "strided")
        )


def test_cross_entropy_of_shards_is_that_of_the_whole(dtype: torch.dtype) -> None:
    logits, labels = (torch.randn(9, 4 * 40) * 4).to(dtype), torch.randint(0, 97, (9,))
    labels[4] = -100
    truth = torch.log_softmax(logits[:, :97].double(), -1)
    expected = -truth.gather(1, labels.clamp(0)[:, None])[:, 0].masked_fill(labels == -100, 0)
    shards = logits.split(40, 1)
    widths = (40, 40, 17, 0)  # the last rank holds nothing but padding
    stats = [ops.cross_entropy_stats(x, labels, 40 * i, w) for i, (x, w) in enumerate(zip(shards, widths, strict=True))]
    loss, lse = ops.cross_entropy(shards[0], torch.stack(stats), labels, 0, 40, -100, False)
    assert (loss - expected).abs().max() < 1e-5
    gradient = truth.exp()
    gradient[torch.arange(9), labels.clamp(0)] -= 1
    gradient = torch.nn.functional.pad(gradient.masked_fill(labels[:, None] == -100, 0), (0, 63))
    parts = [
        ops.cross_entropy_gradient(x, labels, lse, torch.ones(9), 40 * i, w, -100)
        for i, (x, w) in enumerate(zip(shards, widths, strict=True))
    ]
    assert (torch.cat(parts, 1) - gradient).abs().max() < max(1e-6, torch.finfo(dtype).eps)
    assert not parts[3].any()


def test_cross_entropy_of_difficult_rows(dtype: torch.dtype) -> None:
    logits = torch.randn(6, 700)
    logits[0] += 1000
    logits[1, 350] = 1e3
    logits[2] = 0
    logits[3, 4:] = -torch.inf
    logits[4, ::2] = torch.finfo(dtype).min
    labels = torch.tensor([5, 350, 6, 2, 7, 8])
    judge(kernel_checks.cross_entropy_checks(logits.to(dtype), labels, torch.rand(6), 0, 700), "difficult")
    masked = torch.full((6,), -100)
    stats = ops.cross_entropy_stats(logits.to(dtype), masked, 0, 700)
    loss, lse = ops.cross_entropy(logits.to(dtype), stats[None], masked, 0, 700, -100, False)
    assert not loss.any()
    assert not ops.cross_entropy_gradient(logits.to(dtype), masked, lse, torch.ones(6), 0, 700, -100).any()


def test_nan_and_infinity_are_not_lost(dtype: torch.dtype) -> None:
    x = torch.randn(4, 64).to(dtype)
    x[1, 5], x[2, 5] = torch.nan, torch.inf
    weight = torch.ones(64).to(dtype)
    y = ops.rms_norm(x, weight, 1e-5, False)[0]
    assert y[1].isnan().all()
    assert y[2, 5].isnan()
    assert y[[0, 3]].isfinite().all()
    out = ops.swiglu(x)
    assert out[1, 5].isnan()
    assert out[[0, 3]].isfinite().all()
    assert ops.cross_entropy_stats(x, torch.zeros(4, dtype=torch.long), 0, 64)[1, 1].isnan()


def test_halves_convert_as_in_torch() -> None:
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        values = every.view(dtype)
        half = rotary_tables(1, 1, torch.device("cpu"))  # position 0 is not rotated: y is x, rounded back
        q = values.view(1, 1, -1, 2)
        turned = ops.rotary(q, q, *half, None, False)[0].flatten()
        expected = (q.float() * torch.tensor([1.0]) + 0 * q.float().flip(-1)).flatten()
        assert torch.equal(turned.isnan(), expected.isnan())
        keep = ~expected.isnan()
        assert torch.equal(turned[keep].float(), expected[keep])


def test_empty_input(dtype: torch.dtype) -> None:
    x, weight = torch.empty(0, 64, dtype=dtype), torch.ones(64, dtype=dtype)
    assert ops.rms_norm(x, weight, 1e-5, False)[0].shape == (0, 64)
    dx, dw = ops.rms_norm_backward(x, x, weight, torch.empty(0), None, False)
    assert dx.shape == (0, 64)
    assert not dw.any()
    assert ops.swiglu(x).shape == (0, 32)
