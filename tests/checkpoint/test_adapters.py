"""Checkpoints of a run with `lora`: a peft folder, from which a run resumes at any layout with the same base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.verify import verify_checkpoint
from megatron.layout.peft_folder import read_adapter
from tests.support.checkpoint_runs import STEPS, STOP, arguments, train
from tests.support.engine_runs import make_samples, rank_parameters, whole_logits
from tests.support.lora import ALL, ALPHA, RANK, adapter_state, base_of, peft_model
from tests.support.models import LLAMA3_ROPE, Case
from tests.support.ranks import RankFailure, run_ranks

pytestmark = pytest.mark.distributed

GQA = Case(heads=8, kv_heads=4, head_dim=4, layers=4, intermediate=40, vocab=61, seq=16, rope=LLAMA3_ROPE)
MHA = Case(heads=4, kv_heads=4, head_dim=8, layers=2, intermediate=40, vocab=64, seq=16)
TIED = Case(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=40, vocab=64, seq=16, tied=True)
LORA = {"rank": RANK, "alpha": ALPHA}
Layout = tuple[int, int, int]


def lora_arguments(case: Case, layout: Layout, base: str, precision: str = "fp32", **keys: Any) -> Any:
    given = {"lora": LORA, "load": base, "from_scratch": False, "checkpoint_factor": STOP} | keys
    return arguments(case, *layout, precision=precision, **given)


def started(args: Any) -> tuple[Any, Any]:
    """(engine, state) as a run begins."""
    from megatron.engine.build import build_engine
    from megatron.parallel.process_groups import form_groups
    from tests.support.engine_runs import load

    engine = build_engine(args, form_groups(args))
    return engine, load(engine, args)


def _through(rank: int, world_size: int, case: Case, layout: Layout, base: str, save: str, keys: dict) -> Any:
    from megatron.checkpoint.save import save_checkpoint

    args = lora_arguments(case, layout, base, save=save, **keys)
    engine, state = started(args)
    assert (state.iteration, state.base.fingerprint != "0" * 16) == (0, True)
    history = train(engine, args, state, STOP, case)
    save_checkpoint(engine, args, state, data_fingerprints={})
    history += train(engine, args, state, STEPS - STOP, case)
    return history, rank_parameters(engine).tensors


def _resumed(rank: int, world_size: int, case: Case, layout: Layout, base: str, save: str, keys: dict) -> Any:
    args = lora_arguments(case, layout, base, save=save, **keys)
    engine, state = started(args)
    assert (state.iteration, engine.counters.steps) == (STOP, STOP)
    return train(engine, args, state, STEPS - STOP, case), rank_parameters(engine).tensors


def ranks_of(layout: Layout) -> int:
    return layout[0] * layout[1] * layout[2]


@pytest.mark.parametrize(
    ("case", "precision", "layout", "others", "keys"),
    [
        pytest.param(GQA, "fp32", (2, 2, 2), [(1, 1, 2), (4, 1, 1)], {}, id="gqa", marks=pytest.mark.slow),
        pytest.param(MHA, "fp32", (1, 2, 1), [(2, 1, 2)], {}, id="mha"),
        pytest.param(TIED, "bfloat16", (1, 2, 2), [(1, 2, 2)], {}, id="tied-bf16", marks=pytest.mark.slow),
        pytest.param(
            TIED, "fp32", (2, 1, 1), [(1, 2, 2)], {"sequence_parallel": True}, id="sequence", marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_goes_on_bit_equal_and_at_other_layouts(
    case: Case, precision: str, layout: Layout, others: list[Layout], keys: dict, tmp_path: Path
) -> None:
    base, save = base_of(case, tmp_path / "base", precision), str(tmp_path / "save")
    keys = {"precision": precision, **keys}
    through = run_ranks(_through, ranks_of(layout), case, layout, base, save, keys)
    folder = tmp_path / "save" / f"global_step{STOP}"
    assert verify_checkpoint(folder) == []
    assert not list(folder.glob("layer_*"))
    adapter = read_adapter(folder / "adapter")
    assert (adapter.rank, adapter.alpha, set(adapter.targets), adapter.num_layers) == (
        RANK,
        ALPHA,
        set(ALL),
        case.layers,
    )
    resumed = run_ranks(_resumed, ranks_of(layout), case, layout, base, save, keys)
    for one, other in zip(through, resumed, strict=True):
        assert one[0][STOP:] == other[0]
        assert all(torch.equal(tensor, other[1][key]) for key, tensor in one[1].items())
    tolerance = 1e-6 if precision == "fp32" else 2e-3
    for there, engine in [*((other, "deepspeed") for other in others), (layout, "megatron")]:
        found = run_ranks(_resumed, ranks_of(there), case, there, base, save, keys | {"engine": engine})
        assert torch.tensor(found[0][0]) == pytest.approx(torch.tensor(through[0][0][STOP:]), rel=tolerance)


def _logits(rank: int, world_size: int, case: Case, layout: Layout, base: str, folder: str) -> Any:
    from megatron.checkpoint.load import load_weights
    from megatron.engine.build import build_inference_engine
    from megatron.parallel.process_groups import form_groups

    args = lora_arguments(case, layout, base, lora={"load": folder})
    engine = build_inference_engine(args, form_groups(args))
    load_weights(engine, args)
    tokens = torch.stack([sample["tokens"] for sample in make_samples(case, 2)])
    return whole_logits(engine, args, tokens)


def _peft_logits(rank: int, world_size: int, case: Case, folder: str) -> Any:
    from peft import PeftModel

    model = PeftModel.from_pretrained(case.hugging_face(0), folder).eval()
    with torch.no_grad():
        return model(torch.stack([sample["tokens"] for sample in make_samples(case, 2)])).logits


def _save_with_peft(rank: int, world_size: int, case: Case, folder: str, config: dict) -> None:
    targets = tuple(config.get("target_modules", ALL))
    peft_model(case, adapter_state(case, targets, rank=config.get("r", RANK)), **config).save_pretrained(folder)


def last(results: list[Any]) -> Any:
    return next(result for result in results if result is not None)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(GQA, id="gqa"),
        pytest.param(MHA, id="mha", marks=pytest.mark.slow),
        pytest.param(TIED, id="tied", marks=pytest.mark.slow),
    ],
)
def test_peft_reads_what_is_written_here_and_the_reverse(case: Case, tmp_path: Path) -> None:
    base = base_of(case, tmp_path / "base")
    run_ranks(_through, 2, case, (2, 1, 1), base, str(tmp_path / "save"), {})
    ours = last(run_ranks(_logits, 4, case, (2, 2, 1), base, str(tmp_path / "save")))
    theirs = run_ranks(_peft_logits, 1, case, f"{tmp_path}/save/global_step{STOP}/adapter")[0]
    assert float((ours - theirs).abs().max()) < 1e-5
    config = {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    run_ranks(_save_with_peft, 1, case, str(tmp_path / "peft"), config)
    theirs = run_ranks(_peft_logits, 1, case, str(tmp_path / "peft"))[0]
    ours = last(run_ranks(_logits, 2, case, (1, 2, 1), base, str(tmp_path / "peft")))
    assert float((ours - theirs).abs().max()) < 1e-5


def test_another_base_stops_a_run_that_goes_on(tmp_path: Path) -> None:
    base, other = base_of(MHA, tmp_path / "base"), base_of(MHA, tmp_path / "other", seed=1)
    run_ranks(_through, 1, MHA, (1, 1, 1), base, str(tmp_path / "save"), {})
    with pytest.raises(RankFailure, match=r"was trained beside base .* holds other weights"):
        run_ranks(_resumed, 1, MHA, (1, 1, 1), other, str(tmp_path / "save"), {})


def _fingerprint(rank: int, world_size: int, case: Case, layout: Layout, base: str, change: float) -> str:
    from megatron.checkpoint.fingerprint import base_fingerprint

    engine, _ = started(lora_arguments(case, layout, base))
    if change and engine.place.tp_rank == 0:
        parameter = dict(next(engine.numbered_layers())[1].named_parameters())["word_embeddings.weight"]
        parameter.data[0, 0] += change
    return base_fingerprint(engine, lora_arguments(case, layout, base))


def test_the_fingerprint_is_that_of_the_weights_at_any_layout(tmp_path: Path) -> None:
    base = base_of(GQA, tmp_path / "base")
    found = {
        value
        for layout in ((1, 1, 1), (2, 2, 1), (4, 1, 2))
        for value in run_ranks(_fingerprint, ranks_of(layout), GQA, layout, base, 0.0)
    }
    assert len(found) == 1
    assert run_ranks(_fingerprint, 1, GQA, (1, 1, 1), base, 1e-6)[0] not in found
