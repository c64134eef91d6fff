"""Loading weights only and DeepSpeed's files; a checkpoint that does not fit is refused before anything changes."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from megatron.checkpoint.load import load_weights
from megatron.checkpoint.manifest import Manifest, read_manifest, write_manifest
from megatron.checkpoint.save import save_checkpoint
from megatron.checkpoint.state import TrainState
from megatron.checkpoint.torch_files import write_tensors
from megatron.checkpoint.verify import verify_checkpoint
from megatron.common.errors import CheckpointError
from megatron.engine.build import build_inference_engine
from tests.support.checkpoint_runs import BATCH, CASE, STOP, TIED, arguments, masters, train
from tests.support.checkpoints import rewrite, wasted_bytes, write_weights
from tests.support.engine_runs import batch_of, build, load, make_samples, rank_parameters
from tests.support.log_lines import LogLines
from tests.support.models import Case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


def _save(rank: int, world_size: int, case: Case, split: tuple, keys: dict) -> Any:
    args = arguments(case, *split, **keys)
    engine = build(args, case)
    state = TrainState(hf_files={"config.json": b"{}", "original/params.json": b"1"} if rank == 0 else {})
    train(engine, args, state, STOP)
    save_checkpoint(engine, args, state, data_fingerprints={"toy": "1"})
    return rank_parameters(engine).tensors


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, weights by (tp rank, layer, name)) of a bf16 run at TP2 PP2 DP1 after two steps."""
    root = tmp_path_factory.mktemp("saved")
    results = run_ranks(_save, 4, CASE, (2, 2, 1), {"precision": "bfloat16", "save": str(root), "checkpoint_factor": 1})
    weights = {(rank % 2, *key): tensor for rank, tensors in enumerate(results) for key, tensor in tensors.items()}
    return root, weights


def _load_and_step(rank: int, world_size: int, case: Case, split: tuple, keys: dict, refresh: bool) -> Any:
    """Load over different random weights, return weights and masters, and step once with a learning rate of 0."""
    from deepspeed.utils import safe_get_full_fp32_param

    args = arguments(case, *split, from_scratch=False, **keys)
    engine: Any = build(args, case, seed=1)
    if not refresh:
        engine.weights_changed = lambda: None  # the mutation that these tests must detect
    log = LogLines(rank)
    state = load(engine, args)
    loaded = rank_parameters(engine).tensors
    full = {
        (index, name): safe_get_full_fp32_param(parameter)
        for index, layer in engine.numbered_layers()
        for name, parameter in layer.named_parameters()
    }
    engine.set_learning_rate(0.0)
    engine.train_step(batch_of(engine, args, make_samples(case, BATCH)))
    return state, loaded, full, rank_parameters(engine).tensors, log.lines


@pytest.mark.parametrize("refresh", [True, False], ids=["", "mutation-stale-masters"])
@pytest.mark.parametrize(
    ("split", "keys"),
    [
        pytest.param((2, 1, 2), {"precision": "bfloat16", "finetune": True}, id="bf16-other-pp-dp"),
        pytest.param((2, 2, 1), {"precision": "fp32", "no_load_optim": True}, id="into-fp32"),
    ],
)
def test_after_a_weights_only_load_masters_are_the_weights(saved: Any, split: tuple, keys: dict, refresh: bool) -> None:
    root, weights = saved
    results = run_ranks(_load_and_step, 4, CASE, split, {**keys, "load": str(root)}, refresh)
    for rank, (state, loaded, full, stepped, lines) in enumerate(results):
        assert loaded, "a stage without weights"
        finetune = keys.get("finetune", False)
        assert (state.iteration, state.consumed_samples) == ((0, 0) if finetune else (STOP, STOP * BATCH))
        assert (state.hf_files == {"config.json": b"{}", "original/params.json": b"1"}) == (rank == 0)
        for key, tensor in loaded.items():
            assert torch.equal(tensor.float(), weights[rank % 2, *key].float()), key
        same_masters = all(torch.equal(full[key], tensor.float()) for key, tensor in loaded.items())
        same_weights = all(torch.equal(stepped[key], tensor) for key, tensor in loaded.items())
        assert same_masters is same_weights is refresh
        if keys["precision"] == "fp32":
            assert any("bfloat16 in the files, float32 here (exact)" in line for line in lines) == (rank == 0)


def _load_weights(rank: int, world_size: int, case: Case, split: tuple, keys: dict) -> Any:
    """Load weights without an optimizer, as evaluation and generation do."""
    from megatron.parallel.process_groups import form_groups

    args = arguments(case, *split, from_scratch=False, **keys)
    engine = build_inference_engine(args, form_groups(args))
    log = LogLines(rank)
    load_weights(engine, args)
    layers = [*engine.numbered_layers(), *engine.tied_copies()]
    own = {(index, name): p.detach().clone() for index, layer in layers for name, p in layer.named_parameters()}
    return own, log.lines


def test_fp32_files_round_into_bf16_and_say_so(tmp_path: Path) -> None:
    write_weights(tmp_path, arguments(CASE, 2, 1, 1).shape, tp=2)
    keys = {"precision": "bfloat16", "load": str(tmp_path)}
    results = run_ranks(_load_weights, 2, CASE, (2, 1, 1), keys)
    for rank, (tensors, lines) in enumerate(results):
        for (index, name), tensor in tensors.items():
            stored = torch.load(
                tmp_path / f"global_step0/layer_{index:02d}-model_{rank:02d}-model_states.pt", weights_only=True
            )
            assert torch.equal(tensor, stored[name].to(torch.bfloat16))
        assert any("float32 in the files, bfloat16 here (rounded" in line for line in lines) == (rank == 0)


def test_a_tied_embedding_fills_both_ends_of_the_pipeline(tmp_path: Path) -> None:
    write_weights(tmp_path, arguments(TIED, 2, 1, 1).shape, tp=2, manifest=False)
    results = run_ranks(_load_weights, 4, TIED, (2, 2, 1), {"load": str(tmp_path)})
    for rank, (tensors, _) in enumerate(results):
        stored = torch.load(tmp_path / f"global_step0/layer_00-model_{rank % 2:02d}-model_states.pt", weights_only=True)
        assert torch.equal(tensors[0, "word_embeddings.weight"], stored["word_embeddings.weight"])


def _deepspeed_saves(rank: int, world_size: int, root: str) -> Any:
    engine: Any = build(arguments(CASE, 2, 2, 1), CASE)
    engine.pipeline_engine.save_checkpoint(root, tag="global_step0")
    return rank_parameters(engine).tensors


def test_what_deepspeed_wrote_is_read_like_a_gpt_neox_checkpoint(tmp_path: Path) -> None:
    """It has no manifest and DeepSpeed's own layer files; it is loaded at another PP."""
    results = run_ranks(_deepspeed_saves, 4, str(tmp_path))
    weights = {(rank % 2, *key): tensor for rank, tensors in enumerate(results) for key, tensor in tensors.items()}
    loaded = run_ranks(_load_and_step, 2, CASE, (2, 1, 1), {"load": str(tmp_path), "finetune": True}, True)
    for rank, (_, tensors, _, _, lines) in enumerate(loaded):
        assert all(torch.equal(tensor, weights[rank, *key]) for key, tensor in tensors.items())
        assert any("has no manifest.json" in line for line in lines) == (rank == 0)


def _deepspeed_loads(rank: int, world_size: int, root: str, tag: str) -> Any:
    from deepspeed.pipe import PipelineModule

    engine: Any = build(arguments(CASE, 2, 2, 1, precision="bfloat16"), CASE, seed=1)
    engine.module.load_state_dir = PipelineModule.load_state_dir.__get__(engine.module)  # ours refuses
    path, client = engine.pipeline_engine.load_checkpoint(root, tag=tag, load_optimizer_states=False)
    assert path is not None
    return rank_parameters(engine).tensors, client["iteration"], engine.counters.steps


def test_deepspeed_reads_what_we_write(saved: Any) -> None:
    """Its own loader, given our checkpoint engine, restores weights and step count from our files."""
    root, weights = saved
    for rank, (tensors, iteration, steps) in enumerate(run_ranks(_deepspeed_loads, 4, str(root), "global_step2")):
        assert (iteration, steps) == (STOP, STOP)
        assert all(torch.equal(tensor, weights[rank % 2, *key]) for key, tensor in tensors.items())


def test_the_files_of_a_checkpoint(saved: Any) -> None:
    root, _ = saved
    folder = root / "global_step2"
    assert verify_checkpoint(folder) == []
    names = set(read_manifest(folder).files)
    assert all(entry.checksum is not None for entry in read_manifest(folder).files.values())
    layers = {f"layer_{i:02d}-model_{t:02d}-model_states.pt" for i in (0, 2, 3, 5, 6) for t in (0, 1)}
    meta = {f"mp_rank_{k:02d}_model_states.pt" for k in range(4)}
    optimizer = {f"rank_{k:05d}_optim_states.safetensors" for k in range(4)}
    assert names == layers | meta | optimizer | {
        "hf/config.json",
        "hf/original/params.json",
        "configs/merged.yml",
    }
    assert yaml.safe_load((folder / "configs/merged.yml").read_text())["model_parallel_size"] == 2
    content = torch.load(folder / "mp_rank_03_model_states.pt", weights_only=True)
    assert content["module"] is None
    assert content["iteration"] == content["global_steps"] == STOP
    assert (content["mp_world_size"], content["dp_world_size"]) == (4, 1)
    assert content["args"]["padded_vocab_size"] == 64
    for name in layers:
        assert all(isinstance(t, torch.Tensor) for t in torch.load(folder / name, weights_only=True).values())
    provenance = read_manifest(folder).provenance
    assert provenance["layout"] == {"tp": 2, "pp": 2, "dp": 1}
    assert provenance["consumed_samples"] == STOP * BATCH
    assert provenance["data"] == {"toy": "1"}
    assert provenance["config"]["num_layers"] == 2
    assert {"torch", "deepspeed", "megatron-core"} <= provenance["versions"].keys()
    for name in layers:
        assert wasted_bytes(folder / name) == 0, name
    for name in optimizer:
        with safe_open(folder / name, "pt") as file:  # safetensors' own reader
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F32", "U8"}  # noqa: SIM118


SHARD = "layer_03-model_01-model_states.pt"
OPTIMIZER = "rank_00002_optim_states.safetensors"


def _unlist(folder: Path, name: str) -> None:
    """Make the manifest agree with a changed or missing file in size, so that the next check must detect it."""
    body = json.loads((folder / "manifest.json").read_text())
    if (folder / name).exists():
        body["files"][name]["bytes"] = (folder / name).stat().st_size
    else:
        del body["files"][name]
    del body["digest"]
    (folder / "manifest.json").write_text(json.dumps(body))


def _delete_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


def _delete_shard_and_entry(folder: Path) -> None:
    _delete_shard(folder)
    _unlist(folder, SHARD)


def _delete_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _delete_shard_and_manifest(folder: Path) -> None:
    _delete_shard(folder)
    (folder / "manifest.json").unlink()


def _truncate(folder: Path) -> None:
    os.truncate(folder / SHARD, 5000)


def _misshape(folder: Path) -> None:
    rewrite(folder / SHARD, lambda c: c.update({"mlp.linear2.weight": torch.zeros(32, 21)}))
    _unlist(folder, SHARD)


def _unexpected_key(folder: Path) -> None:
    rewrite(folder / SHARD, lambda c: c.update({"attention.dense.bias": torch.zeros(32)}))
    _unlist(folder, SHARD)


def _optimizer_truncated(folder: Path) -> None:
    os.truncate(folder / OPTIMIZER, 3000)
    _unlist(folder, OPTIMIZER)


def _optimizer_deleted(folder: Path) -> None:
    (folder / OPTIMIZER).unlink()
    _unlist(folder, OPTIMIZER)


def _optimizer_thinned_out(folder: Path) -> None:
    from megatron.checkpoint.retention import remove_optimizer

    remove_optimizer(folder)


def _nothing(folder: Path) -> None:
    pass


def _no_latest(folder: Path) -> None:
    (folder.parent / "latest").unlink()


FINETUNE = {"finetune": True}
REFUSALS: list[tuple[Any, dict, str]] = [
    (_no_latest, {}, "latest cannot be read"),
    (_nothing, {"iteration": 7}, "global_step7 does not exist"),
    (_delete_shard, FINETUNE, f"global_step2 is not complete: .*{SHARD} is missing"),
    (_delete_shard_and_entry, FINETUNE, f"{SHARD} is missing"),
    (_delete_shard_and_manifest, FINETUNE, f"{SHARD} is missing"),
    (_truncate, FINETUNE, f"{SHARD} has 5000 bytes, the manifest says"),
    (_misshape, {}, rf"{SHARD}: mlp.linear2.weight has shape \[32, 21\], the model's is \[32, 20\]"),
    (_unexpected_key, FINETUNE, f"{SHARD}: attention.dense.bias is not a tensor of this layer"),
    (_optimizer_truncated, {}, f"{OPTIMIZER}: .* ends beyond the end of the file"),
    (_optimizer_deleted, {}, r"optimizer state of layer \d \S+ of tensor rank 0 is not there once from element 0 to"),
    (_optimizer_thinned_out, {}, "has no optimizer states: they were removed"),
    (_delete_manifest, {}, "has no optimizer states: of GPT-NeoX's files those of ZeRO stage 1 are read"),
    (_nothing, {"precision": "fp32"}, "was saved in precision bfloat16, this run is fp32"),
    (_nothing, {"num_layers": 4}, "num_layers: 2 in the checkpoint, 4 in the configuration"),
    (_nothing, {"no_weight_tying": False, **FINETUNE}, "no_weight_tying: true in the checkpoint, false in"),
]


def _refuse(rank: int, world_size: int, split: tuple, scenarios: list[tuple[str, dict]]) -> list[tuple[str, bool]]:
    """(message, whether weights and masters are untouched) for each (folder to load, keys)."""
    keys = {"precision": "bfloat16", "from_scratch": False}
    first = arguments(CASE, *split, **keys, load="unused")
    engine = build(first, CASE, seed=1)
    before, masters_before = rank_parameters(engine).tensors, masters(engine)
    outcome = []
    for folder, more in scenarios:
        args = arguments(CASE, *split, **(keys | {"load": folder} | more))
        try:
            load(engine, args)
            message = ""
        except CheckpointError as error:
            message = str(error)
        untouched = all(torch.equal(t, before[key]) for key, t in rank_parameters(engine).tensors.items())
        untouched &= all(torch.equal(a, b) for a, b in zip(masters(engine), masters_before, strict=True))
        outcome.append((message, untouched))
    return outcome


def test_what_does_not_fit_is_refused_on_all_ranks_before_anything_changes(saved: Any, tmp_path: Path) -> None:
    scenarios = []
    for number, (damage, keys, _) in enumerate(REFUSALS):
        root = tmp_path / str(number)
        shutil.copytree(saved[0], root)
        damage(root / "global_step2")
        scenarios.append((str(root), keys))
    by_rank = run_ranks(_refuse, 4, (2, 2, 1), scenarios)
    for number, (damage, keys, pattern) in enumerate(REFUSALS):
        messages = {outcome[number][0] for outcome in by_rank}
        assert len(messages) == 1, f"ranks disagree about {damage.__name__}: {messages}"
        assert re.search(pattern, messages.pop()), (damage.__name__, keys, by_rank[0][number])
        assert all(outcome[number][1] for outcome in by_rank), f"{damage.__name__} changed something"


def test_a_flipped_bit_of_optimizer_state_stops_all_ranks_with_its_place(saved: Any, tmp_path: Path) -> None:
    """Also at another layout, where only one of several ranks reads it."""
    folder = tmp_path / "global_step2"
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    state = read_manifest(folder).files[OPTIMIZER].ranges[0]
    data = bytearray((folder / OPTIMIZER).read_bytes())
    data[state.arrays["exp_avg"].offset + 5] ^= 1
    (folder / OPTIMIZER).write_bytes(data)
    where = re.escape(f"{OPTIMIZER} is damaged: exp_avg of layer {state.where.layer} {state.where.tensor}, elements [")
    for split in ((2, 2, 1), (1, 1, 4)):
        messages = {outcome[0][0] for outcome in run_ranks(_refuse, 4, split, [(str(tmp_path), {})])}
        assert len(messages) == 1
        assert re.search(rf"loading optimizer states of \S+ failed. rank\S* \d.*{where}", messages.pop())


def _swap_weights(folder: Path) -> None:
    """Combine the optimizer files of one state with the layer files of another, under a valid manifest."""
    other = torch.load(folder / SHARD, weights_only=True)
    other["mlp.linear2.weight"] += 0.5
    entry = write_tensors(folder / SHARD, other)
    manifest = read_manifest(folder)
    write_manifest(folder, Manifest(manifest.files | {SHARD: entry}, manifest.provenance))


def test_masters_that_are_not_the_weights_are_refused(saved: Any, tmp_path: Path) -> None:
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    _swap_weights(tmp_path / "global_step2")
    for split in ((2, 2, 1), (1, 2, 2)):
        by_rank = run_ranks(_refuse, 4, split, [(str(tmp_path), {})])
        assert "masters in the optimizer files are not the weights in the layer files" in by_rank[0][0][0]
