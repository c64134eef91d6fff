"""Saves beside training: the saved step's state, whatever training does meanwhile; failures reported, not fatal."""

from __future__ import annotations

import random
import threading
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.checkpoint import BackgroundSaver, TrainState, background, save, save_checkpoint
from megatron.checkpoint.manifest import read_manifest
from megatron.checkpoint.snapshot import HostCopies
from megatron.checkpoint.torch_files import read_file
from megatron.checkpoint.verify import verify_checkpoint
from megatron.engine.deepspeed_files import OPTIMIZER_CLASSES
from tests.checkpoint.test_resume import CASE, STEPS, STOP, TIED, _resume, arguments, masters, train
from tests.support.engine_runs import build, rank_parameters
from tests.support.models import Case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


def quiet(line: str) -> None:
    pass


class Gate:
    """Holds back the writing threads until it is opened."""

    def __init__(self) -> None:
        self._open = threading.Event()
        write = save.CheckpointWriter.write
        opened = self._open

        def held(writer: Any, contents: Any) -> None:
            assert opened.wait(60)
            write(writer, contents)

        background.CheckpointWriter.write = held  # type: ignore[method-assign]

    def open(self) -> None:
        self._open.set()


def _both_ways(rank: int, world_size: int, case: Case, split: tuple, precision: str, root: str, alias: bool) -> Any:
    """Save a step at once and in the background; the latter is written when two more steps have been made."""
    args = arguments(case, *split, precision=precision, save=f"{root}/sync", checkpoint_factor=STOP)
    engine = build(args, case)
    state = TrainState()
    history = train(engine, args, state, STOP)
    save_checkpoint(engine, args, state, data_fingerprints={"toy": "1"}, log=quiet)
    if alias:  # the mutation that the comparison must see
        HostCopies._copy_tensor = lambda self, tensor, path: tensor  # type: ignore[method-assign]
    gate, lines = Gate(), []
    saver = BackgroundSaver(engine, args.replace(save=f"{root}/async"), {"toy": "1"}, log=lines.append)
    saver.begin(state)
    draws = random.random(), float(torch.rand(()))
    for _ in range(STEPS - STOP):
        history += train(engine, args, state, 1)
        saver.poll()
    assert saver.completed is None
    gate.open()
    saver.wait()
    assert saver.completed == STOP
    return history, rank_parameters(engine).tensors, masters(engine), draws, lines


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Places where two contents of checkpoint files are not the same, tensors to the bit."""
    if isinstance(one, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and one.requires_grad == other.requires_grad
        return [] if same and raw(one) == raw(other) else [where]
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        return [place for key in one for place in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple):
        assert len(one) == len(other), where
        return [
            place for i, pair in enumerate(zip(one, other, strict=True)) for place in differences(*pair, f"{where}/{i}")
        ]
    if hasattr(one, "__dict__") and not is_dataclass(one) and not isinstance(one, Enum):
        return differences(vars(one), vars(other), where)
    return [] if one == other else [where]


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def file_differences(one: Path, other: Path) -> list[str]:
    names = sorted(path.name for path in one.glob("*.pt"))
    assert names == sorted(path.name for path in other.glob("*.pt"))
    contents = ([read_file(folder / name, classes=OPTIMIZER_CLASSES) for folder in (one, other)] for name in names)
    return [place for name, pair in zip(names, contents, strict=True) for place in differences(*pair, name)]


@pytest.mark.parametrize("alias", [False, True], ids=["", "mutation-live-tensors"])
@pytest.mark.parametrize(
    ("case", "precision"),
    [
        pytest.param(CASE, "fp32", id="fp32"),
        pytest.param(TIED, "bfloat16", id="tied-bf16"),
    ],
)
def test_a_background_save_is_the_saved_steps_state(case: Case, precision: str, alias: bool, tmp_path: Path) -> None:
    """Equal to the save that training waited for, in every file and to the bit; and a run that resumes from it is the
    one that went on."""
    through = run_ranks(_both_ways, 8, case, (2, 2, 2), precision, str(tmp_path), alias)
    folders = [tmp_path / way / f"global_step{STOP}" for way in ("sync", "async")]
    differing = file_differences(*folders)
    if alias:
        assert any("layer_" in place for place in differing)
        assert any("exp_avg" in place for place in differing)
        return
    assert differing == []
    one, other = map(read_manifest, folders)
    assert {n: e.tensors for n, e in one.files.items()} == {n: e.tensors for n, e in other.files.items()}
    assert one.provenance | {"created": 0, "config": 0} == other.provenance | {"created": 0, "config": 0}
    assert [verify_checkpoint(folder) for folder in folders] == [[], []]
    assert {p.name for p in folders[0].iterdir()} == {p.name for p in folders[1].iterdir()}
    assert any(line.startswith(f"saved {folders[1]}: training waited") for line in through[0][4])
    resumed = run_ranks(_resume, 8, case, (2, 2, 2), precision, str(tmp_path / "async"))
    for one_rank, other_rank in zip(through, resumed, strict=True):
        assert one_rank[0][STOP:] == other_rank[0], "losses or gradient norms"
        assert all(torch.equal(tensor, other_rank[1][key]) for key, tensor in one_rank[1].items()), "weights"
        assert all(torch.equal(a, b) for a, b in zip(one_rank[2], other_rank[2], strict=True)), "fp32 masters"
        assert one_rank[3] == other_rank[3], "random numbers"
