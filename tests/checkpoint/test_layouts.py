"""A run saved at one TP x PP x DP resumes at another with a bit-equal state and the uninterrupted run's losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import state_ranges
from megatron.checkpoint.load import load_weights
from megatron.checkpoint.verify import verify_checkpoint
from megatron.engine.build import build_inference_engine
from tests.support.checkpoint_runs import STOP, arguments
from tests.support.engine_runs import rank_parameters, whole_model
from tests.support.layouts import Layout, resume_elsewhere, save_and_go_on, whole_state
from tests.support.models import Case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

# 61 vocabulary rows are stored as 61, 62 or 64 at TP 1, 2 and 4.
ODD = Case(heads=4, kv_heads=4, head_dim=8, layers=4, intermediate=40, vocab=61, seq=16)
GROUPED = replace(ODD, heads=8, head_dim=4)
TIED = replace(GROUPED, tied=True)
SAME = 1e-6
OTHER_SUMS = 2e-3  # where bfloat16 rounds other partial sums; 2e-4 to 6e-4 were observed
BLOCK = 100  # elements per checksum: ranges have several, and none ends with a row


def ranks_of(layout: Layout) -> int:
    tp, pp, dp = layout
    return tp * pp * dp


class Saved:
    """A run that was saved and continued."""

    def __init__(self, case: Case, precision: str, layout: Layout, folder: Path) -> None:
        self.case, self.precision, self.layout, self.folder = case, precision, layout, folder
        keys = (case, layout, precision, str(folder / "first"), BLOCK)
        self.went_on = run_ranks(save_and_go_on, ranks_of(layout), *keys)[0]
        self.checkpoint = folder / "first" / f"global_step{STOP}"
        assert verify_checkpoint(self.checkpoint) == []

    def resume(self, layout: Layout, tolerance: float = SAME) -> list[set[str]]:
        """Resume at `layout` and compare; returns the optimizer files that each rank opened."""
        again = self.folder / "again_{}_{}_{}".format(*layout)
        keys = (self.case, layout, self.precision, str(self.folder / "first"), str(again), BLOCK)
        results = run_ranks(resume_elsewhere, ranks_of(layout), *keys)
        saved_again = again / f"global_step{STOP}"
        assert verify_checkpoint(saved_again) == []
        before, after = whole_state(self.checkpoint), whole_state(saved_again)
        assert before.keys() == after.keys()
        assert [key for key, tensor in before.items() if not torch.equal(tensor, after[key])] == []
        if layout == self.layout:
            assert results[0][0] == self.went_on, "not to the bit"
        found, expected = torch.tensor(results[0][0]), torch.tensor(self.went_on)
        print(self.layout, layout, self.precision, float(((found - expected) / expected).abs().max()))
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
        text = "saved at TP{} PP{} DP{}, running at TP{} PP{} DP{}".format(*self.layout, *layout)
        assert (text in results[0][1]) == (self.layout != layout)
        return [opened for _, _, opened in results]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_ranges, "BLOCK", BLOCK)


@pytest.mark.parametrize(
    ("case", "precision", "saved", "running"),
    [
        pytest.param(ODD, "fp32", (2, 2, 2), (1, 4, 1), id="tp2-pp2-dp2 to pp4"),
        pytest.param(TIED, "fp32", (1, 1, 2), (4, 2, 1), id="tied, dp2 to tp4-pp2"),
        pytest.param(GROUPED, "bfloat16", (2, 1, 2), (2, 2, 1), id="bf16, grouped, dp2 to pp2"),
    ],
)
def test_another_layout(case: Case, precision: str, saved: Layout, running: Layout, tmp_path: Path) -> None:
    Saved(case, precision, saved, tmp_path).resume(running)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "precision", "saved", "running"),
    [
        pytest.param(ODD, "fp32", (2, 2, 2), [(2, 2, 2), (4, 1, 2), (1, 1, 4), (4, 2, 1), (2, 1, 4)], id="from 2-2-2"),
        pytest.param(ODD, "fp32", (1, 1, 1), [(1, 1, 1), (4, 1, 1), (1, 4, 2), (2, 4, 1)], id="from 1-1-1"),
        pytest.param(GROUPED, "fp32", (4, 2, 1), [(1, 2, 4), (2, 2, 1), (4, 1, 1)], id="grouped from 4-2-1"),
        pytest.param(GROUPED, "fp32", (1, 4, 2), [(2, 1, 2), (4, 1, 2), (1, 1, 1)], id="grouped from 1-4-2"),
        pytest.param(TIED, "fp32", (2, 2, 2), [(2, 2, 2), (4, 2, 1), (1, 1, 4), (2, 4, 1)], id="tied from 2-2-2"),
        pytest.param(TIED, "fp32", (1, 4, 1), [(1, 1, 2), (4, 1, 1), (2, 2, 2)], id="tied from 1-4-1"),
        pytest.param(ODD, "bfloat16", (2, 2, 1), [(2, 2, 1), (2, 1, 2), (2, 4, 1)], id="bf16 from 2-2-1"),
        pytest.param(TIED, "bfloat16", (1, 2, 2), [(1, 2, 1), (1, 4, 1), (1, 4, 2)], id="bf16, tied from 1-2-2"),
    ],
)
def test_many_layouts(case: Case, precision: str, saved: Layout, running: list[Layout], tmp_path: Path) -> None:
    run = Saved(case, precision, saved, tmp_path)
    for layout in running:
        run.resume(layout)


@pytest.mark.slow
@pytest.mark.parametrize("case", [ODD, TIED], ids=["untied", "tied"])
def test_layouts_that_round_elsewhere_in_bf16(case: Case, tmp_path: Path) -> None:
    """The state is bit-equal; in the next steps other partial sums are rounded: those of a tensor-parallel product, and
    those of a tied matrix, whose two gradients are summed in bfloat16 on one stage and in fp32 across two."""
    run = Saved(case, "bfloat16", (1, 2, 2), tmp_path)
    for layout in ((2, 2, 1), (4, 1, 1), (1, 1, 2)):
        run.resume(layout, OTHER_SUMS)


@pytest.mark.slow
def test_a_rank_opens_the_files_that_overlap_its_ranges(tmp_path: Path) -> None:
    run = Saved(ODD, "fp32", (2, 2, 2), tmp_path)
    for rank, opened in enumerate(run.resume((2, 2, 2))):
        assert opened == {f"rank_{rank:05d}_optim_states.safetensors"}
    # Each rank reads half of its stage and tp_rank, saved by two replicas.
    for rank, opened in enumerate(run.resume((2, 2, 1))):
        pp_rank, tp_rank = divmod(rank, 2)
        assert opened == {
            f"rank_{4 * pp_rank + 2 * dp_rank + tp_rank:05d}_optim_states.safetensors" for dp_rank in (0, 1)
        }


def _weights(rank: int, world_size: int, case: Case, layout: Layout, folder: str) -> Any:
    from megatron.parallel.process_groups import form_groups

    state_ranges.BLOCK = BLOCK
    args = arguments(case, *layout, precision="bfloat16", load=folder, from_scratch=False)
    engine = build_inference_engine(args, form_groups(args))
    load_weights(engine, args)
    return rank_parameters(engine)


def test_weights_alone_at_another_tensor_parallel_size(tmp_path: Path) -> None:
    """As read by evaluation and generation; a flipped bit is detected before anything is used."""
    keys = (GROUPED, (2, 1, 1), "bfloat16", str(tmp_path), BLOCK)
    run_ranks(save_and_go_on, 2, *keys)
    checkpoint = tmp_path / f"global_step{STOP}"
    ranks = run_ranks(_weights, 4, GROUPED, (4, 1, 1), str(tmp_path))
    found = whole_model(ranks, arguments(GROUPED, 4, 1, 1))
    expected = {name: tensor for (kind, name), tensor in whole_state(checkpoint).items() if kind == "weight"}
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    path = checkpoint / "layer_03-model_01-model_states.pt"
    data = bytearray(path.read_bytes())
    tensor = torch.load(path, weights_only=True)["mlp.linear2.weight"]
    data[data.index(tensor.view(torch.uint8).numpy().tobytes()) + 9] ^= 1
    path.write_bytes(data)
    outcome = run_ranks(_weights, 4, GROUPED, (4, 1, 1), str(tmp_path), expect_failure=True)
    assert "layer_03-model_01-model_states.pt is damaged: mlp.linear2.weight has checksum" in outcome[0][1]
