"""Low-rank adapters (LoRA): rows of the table beside those of their base, and the names that peft gives them.

An adapter adds scale * B A to a Hugging Face projection W [out, in]: A is [rank, in], B [out, rank] (Hu et al. 2021).
Each projection has its own pair, even where several share a fused matrix here: any peft adapter of a Llama can be read,
and every trained adapter is a peft adapter. Standard library only.
"""

from __future__ import annotations

from dataclasses import fields
from functools import cache

from megatron.layout.row import Initialization, TensorRow
from megatron.layout.shape import LlamaShape
from megatron.layout.table import DECODER_LAYER

FACTOR_A, FACTOR_B = "lora_A", "lora_B"
PEFT_PREFIX = "base_model.model."


def _projections() -> dict[str, tuple[TensorRow, int]]:
    found = {}
    for row in DECODER_LAYER:
        if len(row.sizes[0]) == 2:
            for source, name in enumerate(row.hf):
                found[projection_of(name)] = (row, source)
    return found


def projection_of(hf: str) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj.weight`."""
    return hf.rsplit(".", 2)[-2]


PROJECTIONS = _projections()
"""For every projection that can have an adapter, by name: the row of its fused matrix, and its source number there."""


def in_table_order(targets: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """The projections of `targets`, each once, in the table's order."""
    return tuple(name for name in PROJECTIONS if name in targets)


@cache
def factor_rows(rank: int, targets: tuple[str, ...]) -> tuple[TensorRow, ...]:
    """The rows of A and B of every target, in the table's order."""
    rows = []
    for target in in_table_order(targets):
        base, source = PROJECTIONS[target]
        rows.append(base.low_rank_factor(source, 1, rank, FACTOR_A, Initialization.UNIFORM))
        rows.append(base.low_rank_factor(source, 0, rank, FACTOR_B, Initialization.ZEROS))
    return tuple(rows)


_CLASSES: dict[tuple[type[LlamaShape], tuple[TensorRow, ...]], type[LlamaShape]] = {}


def _with_table(kind: type[LlamaShape], table: tuple[TensorRow, ...]) -> type[LlamaShape]:
    """The class of shapes with this table; there is one for each table, so that equal shapes compare equal."""
    known = {"table": table, "frozen_base": True, "__module__": __name__}
    return _CLASSES.setdefault((kind, table), type(f"Adapted{kind.__name__}", (kind,), known))


def _like(shape: LlamaShape, table: tuple[TensorRow, ...]) -> LlamaShape:
    sizes = {field.name: getattr(shape, field.name) for field in fields(shape)}
    return _with_table(type(shape), table)(**sizes)


def adapted(shape: LlamaShape, rank: int, targets: tuple[str, ...]) -> LlamaShape:
    """The model with an adapter: the tensors of its base, and the factors."""
    return _like(shape, (*shape.table, *factor_rows(rank, targets)))


def adapter_alone(shape: LlamaShape, rank: int, targets: tuple[str, ...]) -> LlamaShape:
    """The factors of an adapted model without its base: what is trained and saved."""
    return _like(shape, factor_rows(rank, targets))


def is_factor(name: str) -> bool:
    """Whether a tensor of a decoder layer belongs to an adapter."""
    return any(part in (FACTOR_A, FACTOR_B) for part in name.split("."))


def trained_rows(shape: LlamaShape) -> tuple[TensorRow, ...]:
    """The rows of a shape's table whose tensors are trained."""
    return tuple(row for row in shape.table if not shape.frozen_base or is_factor(row.neox))


def peft_name(row: TensorRow, layer: int) -> str:
    """What peft calls the factor of decoder layer `layer` in `adapter_model.safetensors`."""
    return PEFT_PREFIX + row.hf[0].format(layer=layer)
