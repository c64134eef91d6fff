"""A table with invented rows, without other changes: initialization, layer files, converter and planner follow it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron import layout
from megatron.checkpoint.layer_files import verify_before_load
from megatron.checkpoint.manifest import read_manifest
from megatron.layout import LlamaShape
from megatron.model.initialize import initialize_layers
from megatron.neox_arguments import NeoXArgs
from megatron.planner.cost.checkpoint_size import checkpoint_size
from megatron.planner.cost.memory import plan_memory
from megatron.planner.cost.parallel_layout import ParallelLayout
from tests.support.checkpoints import SHAPE, module_of, rewrite, write_weights
from tests.support.engine_runs import RankParameters, whole_model
from tests.support.hf_folders import Model, convert, read_hf, same, write_hf
from tests.support.invented_rows import CHANNELS, IN_DECODER, RANK, AdaptedShape, SpectraShape
from tests.support.models import Case
from tools.convert_hf.sources.opening import open_checkpoint

pytestmark = pytest.mark.unit

CASE = Case(heads=8, kv_heads=4, head_dim=4, vocab=150, intermediate=24)


def _started(kind: type[LlamaShape], tp: int) -> tuple[dict[str, Tensor], NeoXArgs]:
    """A model's initial weights from `tp` ranks, assembled under their Hugging Face names."""
    args = CASE.neox(
        model_parallel_size=tp,
        world_size=tp,
        make_vocab_size_divisible_by=160 // tp,
        init_method="normal",
        output_layer_init_method="scaled_normal",
    )
    vars(args)["shape"] = kind(**vars(args.shape))  # replaces the cached one
    ranks = []
    for tp_rank in range(tp):
        layers = []
        for index, _, rows in layout.layer_files(args.shape):
            empty = {row.neox: torch.full(layout.rank_shape(row, args.shape, tp), torch.nan) for row in rows}
            layers.append((index, module_of(empty)))
        initialize_layers(layers, args, tp, tp_rank)
        tensors = {(index, name): p.detach() for index, layer in layers for name, p in layer.named_parameters()}
        ranks.append(RankParameters(tp_rank, 0, tensors))
    return whole_model(ranks, args), args


@pytest.mark.parametrize("kind", [LlamaShape, AdaptedShape, SpectraShape])
def test_weights_from_scratch_are_the_same_at_every_tensor_parallel_size(kind: type[LlamaShape]) -> None:
    one, _ = _started(kind, 1)
    for tp in (2, 4):
        other, args = _started(kind, tp)
        assert same(one, other)
        assert len(other) == sum(len(row.hf) for _, _, rows in layout.layer_files(args.shape) for row in rows)


def test_weights_start_as_their_rows_say() -> None:
    text, args = _started(AdaptedShape, 2)
    spectra, _ = _started(SpectraShape, 2)
    layer = "model.layers.1."
    for name, std in {
        layer + "self_attn.q_proj.lora_A.weight": args.init_method_std,
        layer + "mlp.gate_proj.bias": args.init_method_std,
        layer + "mlp.up_proj.weight": args.init_method_std,
        layer + "self_attn.o_proj.weight": args.init_method_std / 2,  # scaled by sqrt(2 layers)
    }.items():
        assert float(text[name].std()) == pytest.approx(std, rel=0.3), name
    assert float(spectra["spectra.embed.weight"].std()) == pytest.approx(args.init_method_std, rel=0.3)
    for zeros in (text[layer + "self_attn.q_proj.lora_B.weight"], spectra["spectra.head.bias"]):
        assert not zeros.any()
    for norm in (text[layer + "input_layernorm.weight"], spectra["model.norm.weight"]):
        assert norm.eq(1).all()


def test_a_module_without_a_tensor_of_the_table_is_refused() -> None:
    args = CASE.neox(world_size=1)
    rows = layout.rows_of(2, args.shape)
    module = module_of({row.neox: torch.empty(layout.rank_shape(row, args.shape, 1)) for row in rows})
    vars(args)["shape"] = AdaptedShape(**vars(args.shape))
    with pytest.raises(RuntimeError, match=r"layer 2 and the layout table have different parameters: .*linear1\.bias"):
        initialize_layers([(2, module)], args, 1, 0)


def test_layer_files_and_manifest_are_checked_against_the_rows(tmp_path: Path) -> None:
    shape = AdaptedShape(**vars(SHAPE))
    folder = write_weights(tmp_path, shape, tp=2)
    files = read_manifest(folder).files
    assert verify_before_load(folder, shape, 2, manifest_files=files) == []

    # two layers of two ranks, each with all four tensors too many
    foreign = verify_before_load(folder, SHAPE, 2)
    assert len(foreign) == 16
    assert all(problem.endswith("is not a tensor of this layer") for problem in foreign)

    file = folder / "layer_03-model_01-model_states.pt"
    rewrite(file, lambda content: content.update({"mlp.linear1.bias": content["mlp.linear1.bias"][:-1]}))
    rewrite(file, lambda content: content.pop("attention.query_key_value.q_proj.lora_A.weight"))
    assert verify_before_load(folder, shape, 2, manifest_files=files) == [
        f"{file}: attention.query_key_value.q_proj.lora_A.weight is missing",
        f"{file}: mlp.linear1.bias has shape [23], the model's is [24]",
    ]


def test_layer_files_of_another_modality(tmp_path: Path) -> None:
    shape = SpectraShape(**vars(SHAPE))
    folder = write_weights(tmp_path, shape, tp=2)
    assert verify_before_load(folder, shape, 2) == []
    assert len(verify_before_load(folder, SHAPE, 2)) == 8  # both ends, two ranks: one missing, one foreign


def _with_invented(model: Model) -> dict[str, Tensor]:
    """The model's state, with random tensors of the invented rows."""
    state, generator = model.state(), torch.Generator().manual_seed(5)
    h, f = model.hidden, model.intermediate
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj.lora_A.weight": (RANK, h),
            "self_attn.q_proj.lora_B.weight": (h, RANK),
            "mlp.down_proj.lora_A.weight": (RANK, f),
            "mlp.up_proj.bias": (f,),
            "mlp.gate_proj.bias": (f,),
        }.items():
            state[prefix + name] = torch.randn(shape, generator=generator).to(model.dtype)
    return state


@pytest.mark.parametrize("kv_heads", [2, 8])
def test_the_converter_carries_the_rows_both_ways(
    kv_heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaShape, "table", AdaptedShape.table)
    hf, neox, back = (tmp_path / name for name in ("hf", "neox", "back"))
    model = Model(kv_heads=kv_heads)
    state = write_hf(hf, model, _with_invented(model))
    convert("to-neox", "--input", hf, "--output", neox, "--tp", 2, "--vocab-divisible-by", 1)
    tag = neox / "global_step0"
    up, gate = (state[f"model.layers.1.mlp.{name}_proj.bias"].chunk(2) for name in ("up", "gate"))
    for rank in range(2):
        stored = torch.load(tag / f"layer_03-model_{rank:02d}-model_states.pt", weights_only=True)
        prefix = "model.layers.1."
        assert same(
            {row.neox: stored[row.neox] for row in IN_DECODER},
            {
                "attention.query_key_value.q_proj.lora_A.weight": state[prefix + "self_attn.q_proj.lora_A.weight"],
                "attention.query_key_value.q_proj.lora_B.weight": state[
                    prefix + "self_attn.q_proj.lora_B.weight"
                ].chunk(2)[rank],
                "mlp.linear2.down_proj.lora_A.weight": state[prefix + "mlp.down_proj.lora_A.weight"].chunk(2, dim=1)[
                    rank
                ],
                "mlp.linear1.bias": torch.cat([up[rank], gate[rank]]),
            },
        )
    opened = open_checkpoint(tag).tensors
    assert len(opened["model.layers.0.self_attn.q_proj.lora_A.weight"].replicas) == 1  # compared bit by bit
    assert not opened["model.layers.0.mlp.up_proj.bias"].replicas
    convert("to-hf", "--input", neox, "--output", back)
    assert same(read_hf(back), state)


PLAIN = LlamaShape(4, 64, 8, 4, 176, 160, 160, tied=False)


def _rank_elements(shape: LlamaShape, tp: int) -> dict[str, int]:
    """Elements that each invented row adds to a rank's decoder layer."""
    return {
        "lora_A": RANK * shape.hidden_size,
        "lora_B": shape.hidden_size * RANK // tp,
        "down lora_A": RANK * shape.intermediate_size // tp,
        "bias": 2 * shape.intermediate_size // tp,
    }


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_planner_counts_the_rows(tp: int) -> None:
    adapted = AdaptedShape(**vars(PLAIN))
    added = sum(_rank_elements(PLAIN, tp).values())
    once = sum(_rank_elements(PLAIN, 1).values())
    assert adapted.num_parameters - PLAIN.num_parameters == PLAIN.num_layers * once
    split = ParallelLayout(tensor=tp, pipe=2, data=1, micro_batch=1, num_micro_batches=4)
    before, after = (plan_memory(shape, split, 128) for shape in (PLAIN, adapted))
    assert [b.parameters - a.parameters for a, b in zip(before, after, strict=True)] == [2 * added, 2 * added]
    for a, b in zip(before, after, strict=True):
        assert abs(b.weights - a.weights - 2 * 2 * added) <= 2 * 4  # bf16; groups are padded to even numbers
        assert b.optimizer - a.optimizer == pytest.approx(12 * 2 * added, abs=12 * 4)
    sizes = [checkpoint_size(shape, tp, "bfloat16") for shape in (PLAIN, adapted)]
    assert sizes[1].weights - sizes[0].weights == 2 * tp * PLAIN.num_layers * added
    assert sizes[1].optimizer - sizes[0].optimizer == 12 * tp * PLAIN.num_layers * added


def test_the_planner_counts_another_modality() -> None:
    spectra = SpectraShape(**vars(PLAIN))
    ends = [PLAIN.padded_vocab_size * PLAIN.hidden_size // 2] * 2
    split = ParallelLayout(tensor=2, pipe=2, data=1, micro_batch=1, num_micro_batches=4)
    found = [stage.parameters for stage in plan_memory(spectra, split, 128)]
    text = [stage.parameters for stage in plan_memory(PLAIN, split, 128)]
    assert found == [text[0] - ends[0] + PLAIN.hidden_size * CHANNELS, text[1] - ends[1] + CHANNELS // 2]


def test_weight_decay_follows_rows_and_not_dimensions() -> None:
    """The padding of the two parameter groups reveals their content: an undecayed matrix is grouped with the norms."""
    one = replace(PLAIN, num_layers=1)
    many = ParallelLayout(tensor=1, pipe=1, data=256, micro_batch=1, num_micro_batches=1)
    multiple = 2 * many.data
    undecayed = 3 * one.hidden_size + sum(_rank_elements(one, 1).values())
    (stage,) = plan_memory(AdaptedShape(**vars(one)), many, 128, "fp32")
    decayed = stage.parameters - undecayed
    padded = -(-decayed // multiple) * multiple + -(-undecayed // multiple) * multiple
    assert stage.weights == 4 * padded
    vectors = 3 * one.hidden_size + 2 * one.intermediate_size
    by_dimension = -(-(stage.parameters - vectors) // multiple) * multiple + -(-vectors // multiple) * multiple
    assert padded != by_dimension  # else the sizes chosen here could not tell
