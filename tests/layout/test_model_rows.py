"""The built model has the tensors of the table, and marks for the engines which of them are shards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron import layout
from tests.support.invented_rows import IN_DECODER, AdaptedShape
from tests.support.models import Case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

CASES = {
    "grouped queries": Case(heads=16, kv_heads=8, head_dim=4, vocab=150),
    "multi-head": Case(heads=8, kv_heads=8, head_dim=8, vocab=160),
    "tied": Case(heads=8, kv_heads=8, head_dim=8, tied=True),
}


def _built(rank: int, world_size: int, case: Case, tp: int) -> list[tuple[int, dict[str, Any]]]:
    """(layer number, {parameter: shape}) of every module of the decoder, on rank `tp - 1`."""
    from megatron.model.parallel import TensorParallel
    from megatron.model.pipeline import llama_layers

    group = _fake_group(tp)
    found = []
    with torch.device("meta"):
        layers = llama_layers(case.neox(model_parallel_size=tp, world_size=tp), TensorParallel(group, torch.bfloat16))
        for index, layer in enumerate(layers):
            parameters = layer.build(*layer.arguments).named_parameters() if layer.build else ()
            found.append((index, {name: tuple(p.shape) for name, p in parameters}))
    return found


def _fake_group(tp: int) -> Any:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=tp - 1, world_size=tp)
    parallel_state.initialize_model_parallel(tp, create_gloo_process_groups=False)
    return parallel_state.get_tensor_model_parallel_group()


def _is_part(parameter: torch.nn.Parameter) -> bool:
    """As DeepSpeed and megatron-core query it for their gradient norms."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_every_parameter_has_one_row_with_its_shape(case: str, tp: int) -> None:
    shape = CASES[case].neox(model_parallel_size=tp, world_size=tp).shape
    built = dict(run_ranks(_built, 1, CASES[case], tp)[0])
    assert len(built) == shape.num_layers + 5
    for index, parameters in built.items():
        # a tied model's last layer is the embedding's second copy, which has no file
        copy = shape.tied and index == layout.head_index(shape.num_layers)
        rows = layout.rows_of(layout.EMBEDDING_INDEX if copy else index, shape)
        expected = {row.neox: layout.rank_shape(row, shape, tp) for row in rows}
        assert len(rows) == len(expected)
        assert parameters == expected, index


def _marks(rank: int, world_size: int, case: Case, tp: int) -> dict[str, Any]:
    """{invented parameter: whether it is a shard}, their optimizer groups, and the error without a row."""
    from megatron.engine.optimizer import mark_sharded, parameter_groups, rows_of_parameters
    from megatron.model.llama import TransformerLayer
    from megatron.model.parallel import TensorParallel
    from megatron.model.rotary import RotaryTable

    group = _fake_group(tp)
    args = case.neox(model_parallel_size=tp, world_size=tp)
    shape = AdaptedShape(**vars(args.shape))
    with torch.device("meta"):
        rotary = RotaryTable(args.head_dim, args.rotary_emb_base, args.rope_scaling, args.seq_length)
        layer = TransformerLayer(args, TensorParallel(group, torch.bfloat16), rotary)
        parameters = {}
        for row in IN_DECODER:
            path, name = row.neox.rsplit(".", 1)
            module = layer
            for part in path.split("."):
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            parameters[row.neox] = torch.nn.Parameter(torch.empty(layout.rank_shape(row, shape, tp)))
            setattr(module, name, parameters[row.neox])
    numbered = [(layout.decoder_index(0), layer)]
    rows = rows_of_parameters(numbered, shape)
    mark_sharded(rows)
    found: dict[str, Any] = {name: _is_part(parameter) for name, parameter in parameters.items()}
    groups = parameter_groups(parameters.values(), {id(parameter): row for parameter, row in rows}, 0.1)
    found["groups"] = {group["name"]: (len(group["params"]), group["weight_decay"]) for group in groups}
    try:
        rows_of_parameters(numbered, args.shape)
    except LookupError as error:
        found["error"] = str(error)
    return found


def test_parts_are_marked_by_row_and_not_by_dimension() -> None:
    assert run_ranks(_marks, 1, CASES["grouped queries"], 2)[0] == {
        "attention.query_key_value.q_proj.lora_A.weight": False,
        "attention.query_key_value.q_proj.lora_B.weight": True,
        "mlp.linear2.down_proj.lora_A.weight": True,
        "mlp.linear1.bias": True,
        "groups": {"no_weight_decay_params": (1, 0.0), "no_weight_decay_sharded_params": (3, 0.0)},
        "error": "the layout table has no tensor attention.query_key_value.q_proj.lora_A.weight in layer 2 of 2 "
        "decoder layers",
    }
