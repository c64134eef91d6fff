"""An image model: saved, resumed at another layout, exported, loaded by transformers and torch, and imported again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from examples.astropt.load_exported import load_exported
from megatron.checkpoint import state_ranges
from tests.support.checkpoint_runs import BATCH, STEPS, STOP
from tests.support.engine_runs import make_samples
from tests.support.hf_folders import convert, read_hf
from tests.support.layouts import Layout, resume_elsewhere, save_and_go_on, whole_state
from tests.support.patch_models import PatchCase
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

MLP = PatchCase(heads=8, kv_heads=4, head_dim=8, layers=4, intermediate=40, seq=16)
AFFINE = replace(MLP, tokenizer="affine", positions="learned", normalise="none")


@pytest.mark.parametrize(
    ("case", "saved", "running"),
    [
        pytest.param(MLP, (2, 2, 1), (1, 1, 2), id="mlp"),
        pytest.param(AFFINE, (1, 2, 1), (4, 1, 1), id="affine", marks=pytest.mark.slow),
    ],
)
def test_from_a_checkpoint_to_a_folder_and_back(
    case: PatchCase, saved: Layout, running: Layout, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again, exported, back = (tmp_path / name for name in ("first", "again", "exported", "back"))
    ranks = [torch.tensor(layout).prod().item() for layout in (saved, running)]
    block = state_ranges.BLOCK
    went_on = run_ranks(save_and_go_on, ranks[0], case, saved, "fp32", str(first), block)[0]
    # Resumed at another layout: the same state, and the same losses.
    keys = (case, running, "fp32", str(first), str(again), block)
    resumed = run_ranks(resume_elsewhere, ranks[1], *keys)[0][0]
    torch.testing.assert_close(torch.tensor(resumed), torch.tensor(went_on), rtol=1e-6, atol=0)
    before, after = (whole_state(folder / f"global_step{STOP}") for folder in (first, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    # Exported: its tensors are the checkpoint's, and plain torch computes the run's next loss with them.
    convert("to-hf", "--input", first, "--output", exported)
    weights = {name: tensor for (kind, name), tensor in before.items() if kind == "weight"}
    stored = read_hf(exported)
    assert stored.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name].view_as(tensor)) for name, tensor in stored.items())
    assert json.loads((exported / "patches.json").read_text()) == {
        "order": "spiral",
        "mean": None,
        "std": None,
        **case.keys,
    }
    model = load_exported(exported)
    batch = make_samples(case, BATCH * STEPS)[BATCH * STOP : BATCH * (STOP + 1)]
    patches, targets, mask = (
        torch.stack([sample[name] for sample in batch]) for name in ("patches", "targets", "mask")
    )
    with torch.no_grad():
        each = F.huber_loss(model(patches), model.scale(targets), reduction="none", delta=case.delta)
    assert float(each[mask].mean()) == pytest.approx(went_on[0][0], rel=1e-6)
    # And back, for other ranks; the program itself compares both directions.
    convert("to-neox", "--input", exported, "--output", back, "--tp", 4)
    convert("reshard", "--input", first, "--output", tmp_path / "resharded", "--tp", 4)
    for other in (back, tmp_path / "resharded", exported):
        convert("verify", first, other)
    assert capsys.readouterr().out.count("EQUAL") == 3
    model_yml = (back / "model.yml").read_text()
    assert "modality: 'patches'" in model_yml
    assert "vocab_size" not in model_yml
    # A folder with a different scaling of patches is a different model.
    config = json.loads((exported / "config.json").read_text())
    config["patches"]["order"] = "raster"
    (exported / "config.json").write_text(json.dumps(config))
    convert("verify", first, exported, expect=1)
    assert "images are cut into patches, ordered or scaled differently" in capsys.readouterr().out
    convert("verify", "--forward", first, exported, expect=2)
    assert "is an image model" in capsys.readouterr().err
