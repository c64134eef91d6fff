"""From a Hugging Face folder through the converter into this project's model, and from its checkpoint back.

This is a user's complete path, through files only: `to-neox`, its model.yml, the trainer's loader, with logits compared
with `transformers`; then the trainer's save and `to-hf`, which must give the original bits.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.engine.build import build_engine, build_inference_engine
from tests.support.engine_runs import load, whole_logits
from tests.support.models import LLAMA3_ROPE, Case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
CASES = {
    "gqa": Case(heads=8, kv_heads=4, head_dim=16, rope=LLAMA3_ROPE, theta=500000.0, vocab=150, seq=96),
    "mha": Case(heads=4, kv_heads=4, head_dim=16, vocab=150),
}
RUN = {
    "seq_length": 48,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "train_iters": 5,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8}},
    "lr_decay_style": "constant",
    "warmup": 0.0,
    "weight_decay": 0.1,
    "gradient_clipping": 1.0,
    "precision": "fp32",
    "distributed_backend": "gloo",
    "finetune": True,
    "checkpoint_factor": 1000,
    "train_data_paths": ["unused"],
}


def convert(*words: Any) -> None:
    from tools.convert_hf.cli import main

    assert main([*map(str, words), "--quiet"]) == 0


def hugging_face_folder(folder: Path, case: Case) -> Any:
    model = case.hugging_face()
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return model


def run_arguments(folder: Path, tp: int, pp: int, **more: Any) -> Any:
    """NeoXArgs from the converted folder's own model.yml and a run file."""
    from megatron.neox_arguments import NeoXArgs

    keys = RUN | {"model_parallel_size": tp, "pipe_parallel_size": pp, "load": str(folder)} | more
    run = folder / f"run_{tp}_{pp}.yml"
    if not run.exists():
        run.write_text(json.dumps(keys))
    return NeoXArgs.from_ymls([folder / "model.yml", run], world_size=tp * pp)


def _logits(rank: int, world_size: int, folder: Path, tp: int, pp: int, ids: torch.Tensor) -> torch.Tensor | None:
    """Logits on the last stage, None on the others."""
    from megatron.checkpoint.load import load_weights
    from megatron.parallel.process_groups import form_groups

    args = run_arguments(folder, tp, pp)
    engine = build_inference_engine(args, form_groups(args))
    load_weights(engine, args)
    return whole_logits(engine, args, ids)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_converted_logits_equal_transformers(name: str, tied: bool, tmp_path: Path) -> None:
    case = replace(CASES[name], tied=tied)
    reference = hugging_face_folder(tmp_path / "hf", case)
    ids = torch.randint(case.vocab, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = reference(ids).logits
    for tp in (1, 2, 4):
        folder = tmp_path / f"tp{tp}"
        convert("to-neox", "--input", tmp_path / "hf", "--output", folder, "--tp", tp)
        for pp in (1, 2):
            run_arguments(folder, tp, pp)  # one process writes the run file, the ranks read it
            ours = [x for x in run_ranks(_logits, tp * pp, folder, tp, pp, ids) if x is not None]
            assert len(ours) == tp
            assert max(float((x - theirs).abs().max()) for x in ours) < TOLERANCE, (tp, pp)


def _load_and_save(rank: int, world_size: int, folder: Path, save: Path) -> None:
    from megatron.checkpoint.save import save_checkpoint
    from megatron.parallel.process_groups import form_groups

    args = run_arguments(folder, 2, 2, save=str(save))
    engine = build_engine(args, form_groups(args))
    save_checkpoint(engine, args, load(engine, args), data_fingerprints={})


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_training_checkpoint_goes_back_bit_for_bit(tied: bool, tmp_path: Path) -> None:
    case = replace(CASES["gqa"], tied=tied)
    hugging_face_folder(tmp_path / "hf", case)
    convert("to-neox", "--input", tmp_path / "hf", "--output", tmp_path / "neox", "--tp", 2)
    run_arguments(tmp_path / "neox", 2, 2, save=str(tmp_path / "run"))
    run_ranks(_load_and_save, 4, tmp_path / "neox", tmp_path / "run")
    convert("verify", tmp_path / "neox", tmp_path / "run", "--forward")
    convert("verify", tmp_path / "run")
    convert("to-hf", "--input", tmp_path / "run", "--output", tmp_path / "back")
    convert("verify", tmp_path / "hf", tmp_path / "back")
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name
    convert("reshard", "--input", tmp_path / "run", "--output", tmp_path / "one", "--tp", 1)
    convert("verify", tmp_path / "hf", tmp_path / "one")


def _load_with_deepspeed(rank: int, world_size: int, folder: Path, tp: int, pp: int) -> list[tuple[int, str, bytes]]:
    """Weights after DeepSpeed's own `load_checkpoint`, which GPT-NeoX calls."""
    from deepspeed.pipe import PipelineModule

    from megatron.engine.deepspeed_module import LlamaPipelineModule

    LlamaPipelineModule.load_state_dir = PipelineModule.load_state_dir  # this project disables it
    from megatron.parallel.process_groups import form_groups

    args = run_arguments(folder, tp, pp)
    engine = build_inference_engine(args, form_groups(args))
    path, _ = engine.pipeline_engine.load_checkpoint(
        str(folder), load_optimizer_states=False, load_lr_scheduler_states=False, load_module_strict=False
    )
    assert path is not None
    assert engine.pipeline_engine.loaded_checkpoint_mp_world_size == tp
    return [
        (index, name, parameter.detach().numpy().tobytes())
        for index, layer in engine.numbered_layers()
        for name, parameter in layer.named_parameters()
    ]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2)])
def test_files_are_what_deepspeed_itself_reads(tp: int, pp: int, tmp_path: Path) -> None:
    """DeepSpeed's pipeline engine, with which GPT-NeoX loads checkpoints, reads our layer and mp_rank files."""
    hugging_face_folder(tmp_path / "hf", CASES["gqa"])
    folder = tmp_path / "neox"
    convert("to-neox", "--input", tmp_path / "hf", "--output", folder, "--tp", tp)
    run_arguments(folder, tp, pp)
    for rank, tensors in enumerate(run_ranks(_load_with_deepspeed, tp * pp, folder, tp, pp)):
        assert tensors
        for index, name, raw in tensors:
            file = folder / "global_step0" / f"layer_{index:02d}-model_{rank % tp:02d}-model_states.pt"
            stored = torch.load(file, weights_only=True)
            assert raw == stored[name].numpy().tobytes(), (index, name)
