"""Damaged content is not loaded: whichever file it is in, all ranks stop and the file is named."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fault_runs import write_nan
from megatron.checkpoint import layer_files
from megatron.checkpoint.manifest import FileEntry, checksum, read_manifest
from megatron.checkpoint.save import save_checkpoint
from megatron.checkpoint.state import TrainState
from megatron.checkpoint.torch_files import read_tensors
from megatron.checkpoint.verified import verified, verified_tensors
from megatron.common.errors import CheckpointError
from tests.support.checkpoint_runs import CASE, STOP, arguments, train
from tests.support.checkpoints import write_weights
from tests.support.engine_runs import build
from tests.support.engine_runs import load as load_start
from tests.support.ranks import run_ranks

LAYER = "layer_03-model_01-model_states.pt"
OPTIMIZER = "rank_00001_optim_states.safetensors"
SPLIT = (2, 1, 1)


def flip(path: Path, share: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 0x10
    path.write_bytes(content)


def zero(path: Path) -> None:
    """Zero a block within the largest tensor's bytes."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 512] = bytes(512)
    path.write_bytes(content)


DAMAGES: list[tuple[Any, str, str]] = [
    (flip, LAYER, rf"{LAYER} is damaged: .* the manifest says crc32"),
    (zero, LAYER, rf"{LAYER} is damaged"),
    (flip, OPTIMIZER, rf"rank 1: .*{OPTIMIZER} is damaged"),
    (zero, OPTIMIZER, rf"rank 1: .*{OPTIMIZER} is damaged"),
    (write_nan, OPTIMIZER, r"exp_avg of .* holds values that are not finite"),
    (flip, "manifest.json", "manifest.json"),
    (flip, "mp_rank_00_model_states.pt", "mp_rank_00_model_states.pt is damaged"),
    (flip, "hf/config.json", "config.json is damaged"),
]


def _save(rank: int, world_size: int, root: str) -> None:
    args = arguments(CASE, *SPLIT, save=root, checkpoint_factor=1)
    engine = build(args, CASE)
    state = TrainState(hf_files={"config.json": b"{}", "tokenizer.json": b"{" + b" " * 99 + b"}"} if rank == 0 else {})
    train(engine, args, state, STOP)
    save_checkpoint(engine, args, state, data_fingerprints={})


def _load_damaged(rank: int, world_size: int, folders: list[str], checked: bool) -> list[str]:
    if not checked:  # the mutation: load without checksums
        unverified = pytest.MonkeyPatch()
        unverified.setattr(layer_files, "verified_tensors", lambda path, entry, stored: verified(path, None))
    messages = []
    keys = {"from_scratch": False}
    engine = build(arguments(CASE, *SPLIT, **keys, load="unused"), CASE, seed=1)
    for folder in folders:
        try:
            load_start(engine, arguments(CASE, *SPLIT, **keys, load=folder))
            messages.append("")
        except CheckpointError as error:
            messages.append(str(error))
    return messages


@pytest.mark.distributed
def test_damage_in_any_file_stops_all_ranks(tmp_path: Path) -> None:
    import re

    run_ranks(_save, 2, str(tmp_path / "saved"))
    folders = []
    for number, (damage, name, _) in enumerate(DAMAGES):
        shutil.copytree(tmp_path / "saved", tmp_path / str(number))
        damage(tmp_path / str(number) / f"global_step{STOP}" / name)
        folders.append(str(tmp_path / str(number)))
    first, second = run_ranks(_load_damaged, 2, [*folders, str(tmp_path / "saved")], True)
    assert first == second, "all ranks raise the same"
    assert first.pop() == "", "the undamaged one loads"
    for (damage, name, pattern), message in zip(DAMAGES, first, strict=True):
        assert re.search(pattern, message), f"{damage.__name__} {name}: {message}"
    unchecked = run_ranks(_load_damaged, 2, folders[:2], False)[0]
    assert all("is damaged" not in message for message in unchecked), (
        "without the sums damaged weights load, and this test would see it"
    )


@pytest.mark.unit
@pytest.mark.parametrize("whole", [True, False], ids=["sum of the file", "sums of its tensors"])
def test_either_kind_of_entry_vouches_for_a_layer_file(tmp_path: Path, whole: bool) -> None:
    folder = write_weights(tmp_path)
    path = folder / LAYER
    entry = read_manifest(folder).files[LAYER]
    entry = entry if whole else replace(entry, checksum=None)
    with verified_tensors(path, entry, read_tensors(path)):
        pass
    zero(path)
    with pytest.raises(CheckpointError, match=f"{LAYER} is damaged"), verified_tensors(path, entry, read_tensors(path)):
        pass


@pytest.mark.unit
def test_damage_explains_an_error_of_the_reader(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    good, bad = FileEntry(3, {}, checksum(b"abc")), FileEntry(3, {}, checksum(b"abd"))
    with pytest.raises(CheckpointError, match="file is damaged"), verified(tmp_path / "file", bad):
        raise CheckpointError("it looks odd")
    with pytest.raises(CheckpointError, match="it looks odd"), verified(tmp_path / "file", good):
        raise CheckpointError("it looks odd")
