"""The 70B run's model at all 64 (pipe, tensor) coordinates, without allocating weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def _stage_parameters(rank: int, world_size: int, config: str, tp: int, pp: int, dp: int) -> dict[str, Any]:
    """Parameters over all stages and tensor-parallel ranks, replicated and tied ones once."""
    import deepspeed
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron import layout
    from megatron.engine.build import build_stage
    from megatron.neox_arguments import NeoXArgs
    from megatron.parallel.place import Place

    args = NeoXArgs.from_ymls(
        [config],
        overrides={
            "model_parallel_size": tp,
            "pipe_parallel_size": pp,
            "precision": "bfloat16",
        },
        world_size=tp * pp * dp,
        task="model",
    )
    deepspeed.init_distributed("gloo", verbose=False)  # binds deepspeed.comm to whatever torch's default group is
    dist.destroy_process_group()
    total, disagreements = 0, []
    for stage in range(pp):
        for tp_rank in range(tp):
            me = stage * dp * tp + tp_rank
            dist.init_process_group("fake", store=FakeStore(), rank=me, world_size=tp * pp * dp)
            parallel_state.initialize_model_parallel(tp, pp, create_gloo_process_groups=False)
            ours = (
                parallel_state.get_pipeline_model_parallel_rank(),
                parallel_state.get_data_parallel_rank(),
                parallel_state.get_tensor_model_parallel_rank(),
            )
            if ours != (stage, 0, tp_rank):
                disagreements.append((me, ours))
            stage_module = build_stage(args, Place.of(args, me, 0, torch.device("meta")))
            for index, layer in stage_module.numbered_layers():
                for name, parameter in layer.named_parameters():
                    assert parameter.is_meta
                    row = layout.row_of(index, name, args.shape)
                    assert parameter.shape == layout.rank_shape(row, args.shape, tp), name
                    if not row.replicated or tp_rank == 0:
                        total += parameter.numel()
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
    return {"total": total, "disagreements": disagreements}


@pytest.mark.parametrize(
    ("config", "split", "parameters"),
    [
        pytest.param("llama31_70b", (8, 8, 32), 70_553_706_496, marks=pytest.mark.slow),  # groups of 2,048 ranks
        ("llama31_70b", (8, 8, 2), 70_553_706_496),
        ("llama31_8b", (8, 2, 4), 8_030_261_248),
        ("llama32_1b", (4, 2, 1), 1_235_814_400),
    ],
)
def test_parameters_sum_to_the_published_count(config: str, split: tuple[int, int, int], parameters: int) -> None:
    result = run_ranks(_stage_parameters, 1, str(CONFIGS / config / "model.yml"), *split, timeout=240)[0]
    assert result["total"] == parameters
    assert result["disagreements"] == []


def _all_coordinates(rank: int, world_size: int, tp: int, pp: int, dp: int) -> int:
    """Ranks on which DeepSpeed's topology and megatron-core's rank generator disagree."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
    from megatron.core.parallel_state import RankGenerator

    topo = PipeModelDataParallelTopology(num_pp=pp, num_mp=tp, num_dp=dp)
    generator = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=1, order="tp-cp-ep-dp-pp")
    wrong = 0
    for axis, token, names in (("model", "tp", ("pipe", "data")), ("data", "dp", ("pipe", "model"))):
        for group in generator.get_ranks(token):
            coordinates = [topo.get_coord(r) for r in group]
            wrong += [getattr(c, axis) for c in coordinates] != list(range(len(group)))
            wrong += any(len({getattr(c, n) for c in coordinates}) != 1 for n in names)
    for group in generator.get_ranks("pp"):
        wrong += [topo.get_coord(r).pipe for r in group] != list(range(pp))
    return wrong


def test_rank_coordinates_agree_for_all_2048_ranks() -> None:
    assert run_ranks(_all_coordinates, 1, 8, 8, 32)[0] == 0
