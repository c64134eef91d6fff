"""Low-rank adapters beside the parallel matrices of a decoder layer (Hu et al. 2021): y = W x + scale B A x.

Each Hugging Face projection has its own pair (A, B), a child of the fused matrix that it adapts; the layout table says
how the pair is split over the tensor-parallel ranks. Only A's outputs are communicated, [tokens, rank] per projection:

- column-parallel W: A is replicated, B is split by rows like W. y = W x + join_i(B_i f(A_i x)), where f is the identity
  in the forward pass and all-reduces the gradient. With sequence parallelism x is a slice: f all-gathers, and
  reduce-scatters the gradient.
- row-parallel W: A is split by columns like W, B is replicated. y = g(W x) + B g(A x), where g all-reduces. With
  sequence parallelism g reduce-scatters, and all-gathers the gradient.

A replicated factor thus gets its full gradient on every rank. With sequence parallelism it gets the gradient of the
rank's slice, like the norms, and is summed with theirs (`sequence_parallel.sum_over_slices`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from megatron import layout
from megatron.model.parallel import TensorParallel
from megatron.model.sequence_parallel import Gather, ScatterSum
from megatron.neox_arguments import NeoXArgs


class Factor(nn.Module):
    """A or B. Calling it returns the matrix; an engine that is still gathering the weight waits in a forward hook."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype))

    def forward(self) -> Tensor:
        return self.weight


class Factors(nn.Module):
    """The two factors of one projection, as this rank holds them: A [rank, in], B [out, rank]."""

    def __init__(self, a: tuple[int, ...], b: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.lora_A = Factor(a, dtype)
        self.lora_B = Factor(b, dtype)


class AddedProducts:
    """Forward hook of a fused matrix that adds its adapters' products to its output."""

    def __init__(self, row: layout.TensorRow, args: NeoXArgs, tp: TensorParallel) -> None:
        assert args.lora is not None
        self.row, self.args, self.tp, self.scale = row, args, tp, args.lora.scale
        self.sources = [layout.projection_of(name) for name in row.hf]

    def __call__(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        pairs = {name: child for name in self.sources if isinstance(child := getattr(module, name, None), Factors)}
        stacked = torch.cat([pair.lora_A() for pair in pairs.values()])  # one product for all of them
        between = self._exchanged(F.linear(inputs[0], stacked)) * self.scale
        products = {
            name: F.linear(part, pair.lora_B())
            for (name, pair), part in zip(pairs.items(), between.chunk(len(pairs), dim=-1), strict=True)
        }
        joined = self._joined(products)
        if self.row.shard_dim == 0:  # column-parallel: a new tensor that nothing else needs
            return output.add_(joined)
        return output + joined

    def _exchanged(self, x: Tensor) -> Tensor:
        """f or g (module docstring) of A's output."""
        group, column = self.tp.group, self.row.shard_dim == 0
        if self.tp.sequence_parallel:
            exchanged: Tensor = Gather.apply(x, group, 0) if column else ScatterSum.apply(x, group, 0)
            return exchanged
        if column:
            return copy_to_tensor_model_parallel_region(x, group=group)
        return reduce_from_tensor_model_parallel_region(x, group=group)

    def _joined(self, products: dict[str, Tensor]) -> Tensor:
        """The products packed like the fused matrix's output, with zeros for projections without an adapter."""
        if len(self.sources) == 1:
            return products[self.sources[0]]
        some, (args, ranks) = next(iter(products.values())), (self.args, self.tp.size)
        features = [size[0] // ranks for size in layout.source_shapes(self.row, args.shape)]
        parts = [
            products[name] if name in products else some.new_zeros(*some.shape[:-1], width)
            for name, width in zip(self.sources, features, strict=True)
        ]
        if self.row.packing is layout.Packing.UP_GATE:
            return layout.join_up_gate(*parts)
        heads, kv_heads = args.num_attention_heads // ranks, args.num_kv_heads // ranks
        return layout.join_qkv((parts[0], parts[1], parts[2]), heads, kv_heads, args.head_dim)


def add_adapters(layer: nn.Module, args: NeoXArgs, tp: TensorParallel) -> None:
    """Attach the factors that `args.lora` asks for to the matrices of a decoder layer, uninitialized."""
    assert args.lora is not None
    rows = {row.neox: row for row in layout.factor_rows(args.lora.rank, args.lora.projections)}
    hooked = set()
    for target in args.lora.projections:
        base, _ = layout.PROJECTIONS[target]
        fused = base.neox.rsplit(".", 1)[0]
        matrix = layer.get_submodule(fused)
        a, b = (
            layout.rank_shape(rows[f"{fused}.{target}.{factor}.weight"], args.whole_shape, tp.size)
            for factor in (layout.FACTOR_A, layout.FACTOR_B)
        )
        matrix.add_module(target, Factors(a, b, tp.dtype))
        if fused not in hooked:
            matrix.register_forward_hook(AddedProducts(base, args, tp))
            hooked.add(fused)


def freeze_base(parameters: Iterator[tuple[str, nn.Parameter]]) -> None:
    """Freeze all parameters except those of adapters."""
    for name, parameter in parameters:
        parameter.requires_grad_(layout.is_factor(name))
