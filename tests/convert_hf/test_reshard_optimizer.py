"""`reshard --optimizer`: the same state at another layout, bit for bit; kills, damage, resuming, shares."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import state_ranges
from megatron.checkpoint.manifest import read_manifest
from megatron.checkpoint.verify import verify_checkpoint
from megatron.layout import LlamaShape, padded_vocab_size
from tests.characterization.record import RECORDED
from tests.support.hf_folders import convert, tag_files
from tests.support.kills import killed_at
from tests.support.layouts import whole_state
from tests.support.training_checkpoints import STEP, write_training_checkpoint
from tools.convert_hf.stream import copy

pytestmark = pytest.mark.unit


def shape(tp: int, tied: bool = False) -> LlamaShape:
    return LlamaShape(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=8,
        num_kv_heads=4,
        intermediate_size=48,
        vocab_size=61,
        padded_vocab_size=padded_vocab_size(61, 1, tp),
        tied=tied,
    )


def reshard(root: Path, output: Path, layout: tuple[int, int, int], *more: Any, expect: int = 0) -> Path:
    tp, pp, dp = layout
    split = ("--tp", tp, "--pp", pp, "--dp", dp)
    convert("reshard", "--optimizer", "--input", root, "--output", output, *split, *more, expect=expect)
    return output / f"global_step{STEP}"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 300 elements, which do not coincide with rows, and a journal that records each."""
    monkeypatch.setattr(state_ranges, "BLOCK", 300)
    monkeypatch.setattr(copy, "SYNC_SECONDS", 0.0)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("saved", "wanted"),
    [((2, 2, 2), (1, 4, 1)), ((1, 1, 3), (4, 2, 1)), ((4, 1, 1), (2, 2, 2)), ((2, 1, 1), (2, 4, 3))],
)
def test_the_state_is_the_same_to_the_bit(saved: tuple, wanted: tuple, tied: bool, tmp_path: Path) -> None:
    before = write_training_checkpoint(tmp_path / "saved", shape(saved[0], tied), *saved)
    after = reshard(tmp_path / "saved", tmp_path / "out", wanted)
    assert verify_checkpoint(after) == []
    one, other = whole_state(before), whole_state(after)
    assert one.keys() == other.keys()
    assert [key for key, tensor in one.items() if not torch.equal(tensor, other[key])] == []
    manifest, source = read_manifest(after), read_manifest(before)
    assert manifest.provenance["layout"] == dict(zip(("tp", "pp", "dp"), wanted, strict=True))
    kept = ("precision", "data", "consumed_samples", "config")
    assert [manifest.provenance[key] for key in kept] == [source.provenance[key] for key in kept]
    assert {part.step for entry in manifest.files.values() for part in entry.ranges} == {STEP}
    tp, pp, dp = wanted
    assert len(list(after.glob("*_optim_states.safetensors"))) == tp * pp * dp
    assert len(list(after.glob("mp_rank_*"))) == tp * pp
    meta = torch.load(after / "mp_rank_00_model_states.pt", weights_only=True)
    assert (meta["consumed_samples"], meta["global_steps"], meta["skipped_in_a_row"]) == (8 * STEP, STEP, 0)


def test_resharding_there_and_back_restores_the_state(tmp_path: Path) -> None:
    write_training_checkpoint(tmp_path / "saved", shape(2), 2, 1, 1)
    first = reshard(tmp_path / "saved", tmp_path / "first", (2, 2, 2))
    reshard(tmp_path / "first", tmp_path / "other", (4, 4, 1))
    again = reshard(tmp_path / "other", tmp_path / "again", (2, 2, 2))
    optimizer = {name: data for name, data in tag_files(first).items() if "optim_states" in name}
    assert len(optimizer) == 8
    assert {name: tag_files(again)[name] for name in optimizer} == optimizer


def test_a_checkpoint_of_version_1(tmp_path: Path) -> None:
    """Recorded at TP2 x PP2 x DP2 before ranges existed; its flat partitions are compared with torch alone."""
    old = RECORDED / "checkpoints/global_step10"
    one = ("--tp", 1, "--pp", 1, "--dp", 1)
    convert("reshard", "--optimizer", "--input", old.parent, "--output", tmp_path / "new", *one)
    new = whole_state(tmp_path / "new/global_step10")
    classes = [_class(name) for name in ("fragment_address", "LossScaler", "ZeroStageEnum")]
    total = dict.fromkeys(("master", "exp_avg", "exp_avg_sq"), 0.0)
    norms = 0.0
    for path in old.glob("zero_pp_rank_*"):
        with torch.serialization.safe_globals(classes):
            state = torch.load(path, weights_only=True)["optimizer_state_dict"]
        replicated = int(path.name[-len("00_optim_states.pt") :][:2]) % 2  # its norms are copies of rank 0's
        for group, masters in enumerate(state["single_partition_of_fp32_groups"]):
            if group == 1 and replicated:
                norms += float(masters.detach().double().sum())
                continue
            total["master"] += float(masters.detach().double().sum())
            for kind in ("exp_avg", "exp_avg_sq"):
                total[kind] += float(state["base_optimizer_state"]["state"][group][kind].double().sum())
    assert norms > 0
    for kind, expected in total.items():
        found = sum(float(tensor.double().sum()) for (k, _), tensor in new.items() if k == kind)
        assert found == pytest.approx(expected, rel=1e-12), kind
    masters = {name: tensor for (kind, name), tensor in new.items() if kind == "master"}
    weights = {name: tensor for (kind, name), tensor in new.items() if kind == "weight"}
    assert all(torch.equal(tensor, masters[name]) for name, tensor in weights.items()), "an fp32 run"


def _class(name: str) -> tuple[type, str]:
    modules = {
        "fragment_address": "deepspeed.utils.tensor_fragment",
        "LossScaler": "deepspeed.runtime.fp16.loss_scaler",
        "ZeroStageEnum": "deepspeed.runtime.zero.config",
    }
    return type(name, (), {"__init__": lambda self, *_: None}), f"{modules[name]}.{name}"


@pytest.mark.usefixtures("small_blocks")
def test_kill_9_at_ten_moments_loses_nothing(tmp_path: Path) -> None:
    """The source is unchanged, the output complete or absent; the same command with --resume gives the same bytes."""
    root = tmp_path / "saved"
    write_training_checkpoint(root, shape(2), 2, 2, 1)
    source = tag_files(root)
    expected = tag_files(reshard(root, tmp_path / "whole", (1, 1, 2)).parent)
    calls = ("pwrite", "pwritev", "fsync", "fdatasync", "rename", "replace", "mkdir", "rmdir", "unlink", "open")

    def killed_run(moment: int, out: Path) -> bool:
        return killed_at(moment, lambda: _discard(reshard(root, out, (1, 1, 2))), calls=calls)

    total = 1
    while killed_run(total, tmp_path / f"count{total}"):
        total *= 2
    # At least half of `total` operations are certain to be reached.
    moments = sorted({total // 2 * part // 10 for part in range(1, 11)} | {3})
    resumed = 0
    for moment in moments:
        out = tmp_path / f"out{moment}"
        killed = killed_run(moment, out)
        assert tag_files(root) == source
        if not out.exists():
            assert killed
            reshard(root, out, (1, 1, 2), "--resume")
            resumed += 1
        assert tag_files(out) == expected, f"killed at operation {moment} of {total}"
        assert not out.with_name(out.name + ".partial").exists()
    assert resumed >= 10


def _discard(_: Any) -> None:
    pass


@pytest.mark.usefixtures("small_blocks")
def test_resume_does_only_the_remaining_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.checkpoint.optimizer_reader import StateReader

    root = tmp_path / "saved"
    write_training_checkpoint(root, shape(2), 2, 1, 1)
    read, jobs, limit = StateReader.read, [0], [10**9]

    def counts(self: StateReader, *arguments: Any) -> None:
        jobs[0] += 1
        if jobs[0] > limit[0]:
            raise KeyboardInterrupt
        read(self, *arguments)

    monkeypatch.setattr(StateReader, "read", counts)
    expected = tag_files(reshard(root, tmp_path / "whole", (1, 1, 1)).parent)
    total, jobs[0], limit[0] = jobs[0], 0, 100
    reshard(root, tmp_path / "out", (1, 1, 1), expect=130)
    finished = len((tmp_path / "out.partial/.convert/optimizer_1_of_1.jsonl").read_text().splitlines()) - 1
    assert finished > 50
    jobs[0], limit[0] = 0, 10**9
    reshard(root, tmp_path / "out", (1, 1, 1), "--resume")
    assert tag_files(tmp_path / "out") == expected
    assert jobs[0] + finished == total


@pytest.mark.usefixtures("small_blocks")
def test_a_flipped_bit_stops_with_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_training_checkpoint(tmp_path / "saved", shape(2), 2, 1, 2)
    entries = {name: entry for name, entry in read_manifest(folder).files.items() if entry.ranges}
    name, state = next((name, entry.ranges[1]) for name, entry in entries.items())
    data = bytearray((folder / name).read_bytes())
    data[state.arrays["exp_avg_sq"].offset + 3] ^= 4
    (folder / name).write_bytes(data)
    reshard(tmp_path / "saved", tmp_path / "out", (1, 1, 1), expect=2)
    error = capsys.readouterr().err
    assert f"{name} is damaged: exp_avg_sq of layer {state.where.layer} {state.where.tensor}, elements [" in error
    assert not (tmp_path / "out").exists()


def test_shares_of_several_hosts(tmp_path: Path) -> None:
    root = tmp_path / "saved"
    write_training_checkpoint(root, shape(2), 2, 1, 2)
    expected = tag_files(reshard(root, tmp_path / "whole", (4, 1, 2)).parent)
    for share in ("2/3", "3/3", "1/3"):
        reshard(root, tmp_path / "out", (4, 1, 2), "--shard", share)
        assert (tmp_path / "out").exists() == (share == "1/3")
    assert tag_files(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tp", 2, "--pp", 2), "--pp and --dp describe the layout of optimizer states: add --optimizer"),
        (("--optimizer", "--tp", 2, "--dtype", "fp32"), "--optimizer and --dtype cannot go together"),
        (("--optimizer", "--tp", 2, "--pp", 9), "--pp is 9; expected 1 to 4"),
        (("--optimizer", "--tp", 2, "--dp", 0), "--dp is 0; expected 1 to any number of replicas"),
        (("--optimizer", "--tp", 3), "--tp 3 does not fit this model"),
        (("--optimizer", "--tp", 2, "--max-ram", "60MiB"), "60 MiB is too little for --optimizer with"),
    ],
)
def test_impossible_requests_are_rejected(
    arguments: tuple, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_training_checkpoint(tmp_path / "saved", shape(2), 2, 1, 1)
    convert("reshard", "--input", tmp_path / "saved", "--output", tmp_path / "out", *arguments, expect=2)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_a_checkpoint_that_lacks_state_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron.checkpoint.manifest import Manifest, write_manifest
    from megatron.checkpoint.retention import remove_optimizer

    folder = write_training_checkpoint(tmp_path / "saved", shape(2), 2, 1, 2)
    manifest, lost = read_manifest(folder), "rank_00003_optim_states.safetensors"
    write_manifest(folder, replace(manifest, files={n: e for n, e in manifest.files.items() if n != lost}))
    reshard(tmp_path / "saved", tmp_path / "out", (1, 1, 1), expect=2)
    assert "is not complete: the optimizer state of layer" in capsys.readouterr().err
    write_manifest(folder, Manifest(manifest.files, manifest.provenance))
    remove_optimizer(folder)
    reshard(tmp_path / "saved", tmp_path / "out", (1, 1, 1), expect=2)
    assert "has no optimizer states" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "saved")
