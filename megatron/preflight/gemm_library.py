"""Which library multiplies the configured model's matrices faster on this GPU: hipBLASLt or rocBLAS.

torch chooses one for all products; on gfx90a its default is hipBLASLt, which is not the faster for every shape. Every
rank times the four matrices of a decoder layer, each in the three layouts of a step: the forward product, the gradient
of the input, the gradient of the weight.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.neox_arguments import NeoXArgs
from megatron.ops.bandwidth import Clock
from megatron.parallel.process_groups import GEMM_LIBRARIES
from megatron.planner.cost.compute import layer_matrices

NOTHING_TO_CHOOSE = {
    "cpu": "GEMM library: nothing to choose on a CPU",
    "cuda": "GEMM library: nothing to choose, this PyTorch is not built for ROCm",
}
_MATRICES = ("attention in", "attention out", "MLP in", "MLP out")
_WAYS = ("forward", "input gradient", "weight gradient")
_RUNS = 10


@dataclass(frozen=True)
class Product:
    """The product of one matrix in one layout, and its FLOPs."""

    name: str
    flops: float


def layer_products(args: NeoXArgs) -> list[Product]:
    """The twelve products of a decoder layer and micro-batch on one rank: each matrix in the layouts of `_WAYS`."""
    tokens, matrices = _tokens(args), layer_matrices(args.shape, args.model_parallel_size)
    return [
        Product(f"{name}, {way}", 2.0 * tokens * features_in * features_out)
        for name, (features_in, features_out) in zip(_MATRICES, matrices, strict=True)
        for way in _WAYS
    ]


def multiplications(args: NeoXArgs, device: torch.device) -> list[Callable[[], Tensor]]:
    """`layer_products` on random operands, in their order."""
    dtype = torch.float32 if args.precision == "fp32" else torch.bfloat16
    tokens, found = _tokens(args), []
    for features_in, features_out in layer_matrices(args.shape, args.model_parallel_size):
        x, weight, gradient = (
            torch.randn(shape, device=device, dtype=dtype)
            for shape in ((tokens, features_in), (features_out, features_in), (tokens, features_out))
        )
        ways: dict[str, Callable[[], Tensor]] = {
            "forward": lambda x=x, weight=weight: x @ weight.t(),  # type: ignore[misc]
            "input gradient": lambda gradient=gradient, weight=weight: gradient @ weight,  # type: ignore[misc]
            "weight gradient": lambda gradient=gradient, x=x: gradient.t() @ x,  # type: ignore[misc]
        }
        found += [ways[way] for way in _WAYS]
    return found


def _tokens(args: NeoXArgs) -> int:
    return (args.train_micro_batch_size_per_gpu or 1) * args.seq_length


def time_libraries(args: NeoXArgs, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each product by library. Restores torch's choice of a library afterwards."""
    clock, products = Clock(device), multiplications(args, device)
    before = torch.backends.cuda.preferred_blas_library()
    found = {}
    try:
        for library, name in GEMM_LIBRARIES.items():
            torch.backends.cuda.preferred_blas_library(name)
            found[library] = [clock.time(multiply, _RUNS).median for multiply in products]
    finally:
        torch.backends.cuda.preferred_blas_library(before)
    return found


def choice_lines(args: NeoXArgs, by_rank: Sequence[Mapping[str, Sequence[float]]]) -> list[str]:
    """The choice in one line, then each product: TFLOP/s by library, medians over ranks. `by_rank` are seconds."""
    products = layer_products(args)
    medians = {
        library: [statistics.median(rank[library][number] for rank in by_rank) for number in range(len(products))]
        for library in GEMM_LIBRARIES
    }
    totals = {library: sum(seconds) for library, seconds in medians.items()}
    best, other = sorted(totals, key=lambda library: totals[library])
    each = sum(min(seconds) for seconds in zip(*medians.values(), strict=True))
    lines = [
        f"GEMM library: {best}, {totals[other] / totals[best] - 1:.1%} faster than {other} over the products of a "
        f"layer: gemm_library: {best.lower()} (configured: {args.gemm_library}); choosing for each product would be "
        f"{totals[best] / each - 1:.1%} faster still, but torch has no setting for that"
    ]
    width = max(len(product.name) for product in products)
    for number, product in enumerate(products):
        speeds = ", ".join(f"{library} {product.flops / medians[library][number] / 1e12:.1f}" for library in medians)
        lines.append(f"  {product.name.ljust(width)}  TFLOP/s: {speeds}")
    return lines
