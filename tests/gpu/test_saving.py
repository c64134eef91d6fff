"""On a real GPU: a background save writes the state of its step, from pinned copies."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.checkpoint import background
from megatron.checkpoint.background import BackgroundSaver
from megatron.checkpoint.save import save_checkpoint
from megatron.checkpoint.state import TrainState
from megatron.engine.build import build_engine
from megatron.parallel.place import Place
from tests.support.checkpoint_runs import file_differences
from tests.support.engine_runs import make_samples, step
from tests.support.models import Case
from tests.support.requirements import need

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(200)]

CASE = Case(heads=8, kv_heads=2, head_dim=64, layers=2, intermediate=1408, vocab=1000, seq=128)


@pytest.fixture
def _world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from megatron.core import parallel_state

    from megatron.parallel.process_groups import form_groups

    need("gpu", torch.cuda.is_available(), "torch sees no GPU")
    monkeypatch.setenv("LOCAL_RANK", "0")
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    form_groups(CASE.neox(world_size=1, distributed_backend="nccl"))
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.mark.usefixtures("_world")
@pytest.mark.parametrize("precision", ["fp32", "bfloat16"])
def test_a_background_save_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    args = CASE.neox(
        world_size=1, distributed_backend="nccl", precision=precision, save=str(tmp_path / "sync"), checkpoint_factor=1
    )
    engine = build_engine(args, Place.of(args, 0, 0, torch.device("cuda", 0)))
    engine.initialize_weights()
    samples = make_samples(CASE, 4)
    step(engine, args, samples, 0)
    save_checkpoint(engine, args, TrainState(1, 4), data_fingerprints={})

    moved_on, write = threading.Event(), background.CheckpointWriter.write

    def held(writer: Any, contents: Any) -> None:
        assert moved_on.wait(60)
        write(writer, contents)

    monkeypatch.setattr(background.CheckpointWriter, "write", held)
    saver = BackgroundSaver(engine, args.replace(save=str(tmp_path / "async")), {})
    saver.prepare()
    saver.begin(TrainState(1, 4))
    for number in (1, 2):
        step(engine, args, samples, number)
    moved_on.set()
    saver.wait()
    assert saver.completed == 1
    assert file_differences(*(tmp_path / way / "global_step1" for way in ("sync", "async"))) == []
    large = [buffer for buffer in saver.copies.buffers.values() if buffer.numel() > 100_000]
    assert large
    assert all(buffer.is_pinned() for buffer in large)
