"""Images completed by the pipeline with a cache equal those completed by plain torch without a cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron.data.patch_form import cut_patches, join_patches, patch_order
from megatron.generation.images import nearest_given
from tests.support.made_images import blobs
from tests.support.patch_models import PatchCase
from tests.support.ranks import run_ranks

SIDE, GIVEN = 16, 5
LEARNED = PatchCase(heads=8, kv_heads=4, head_dim=8, layers=4, intermediate=88, seq=16, positions="learned")
CASES = [LEARNED, replace(LEARNED, positions="none", normalise="none", tokenizer="affine", channels=1)]


def _complete(rank: int, world_size: int, cases: list[PatchCase], tp: int, pp: int) -> Any:
    from megatron.core import parallel_state

    from megatron.engine.protocol import no_phases
    from megatron.generation.images import ImageCompleter
    from tests.support.engine_runs import inference

    results = []
    for case in cases:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        args = case.neox(model_parallel_size=tp, pipe_parallel_size=pp, world_size=world_size)
        engine = inference(args, dict(case.hugging_face().state_dict()))
        completer = ImageCompleter(engine, args, no_phases)
        results.append(completer.complete(blobs(3, SIDE, case.channels), GIVEN))
        completer.close()
    return results


def plainly(case: PatchCase, image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Complete one image with a full forward pass for each patch."""
    model, count = case.hugging_face(), (SIDE // case.size) ** 2
    raster, columns = patch_order("spiral", 4, 4), 4
    patches = torch.from_numpy(cut_patches(image, case.size, "spiral").astype(np.float32))[:GIVEN]
    given = patches.clone()
    while len(patches) < count:
        with torch.no_grad():
            predicted = model(patches[None])[0, -1]
        if case.normalise == "none":
            mean, std = (torch.tensor(case.keys[name]) for name in ("mean", "std"))
            raw = (predicted.unflatten(0, (-1, case.channels)) * std + mean).flatten()
        else:
            place = complex(*divmod(int(raster[len(patches)]), columns))
            distances = [abs(place - complex(*divmod(int(other), columns))) for other in raster[:GIVEN]]
            nearest = given[int(np.argmin(distances))]
            raw = predicted * (nearest.std() + 1e-8) + nearest.mean()
        patches = torch.cat([patches, raw[None]])
    return join_patches(patches.numpy(), SIDE, SIDE, case.size, "spiral")


@pytest.mark.distributed
@pytest.mark.parametrize(("tp", "pp"), [(2, 2), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_completion_equals_plain_torch(tp: int, pp: int) -> None:
    by_rank = run_ranks(_complete, tp * pp, CASES, tp, pp)
    for number, case in enumerate(CASES):
        for results in by_rank:
            assert np.array_equal(results[number], by_rank[0][number])
        expected = np.stack([plainly(case, image) for image in blobs(3, SIDE, case.channels)])
        np.testing.assert_allclose(by_rank[0][number], expected, rtol=0, atol=2e-3)  # for values up to 255


@pytest.mark.unit
def test_the_nearest_patch_is_that_of_the_image_not_of_the_sequence() -> None:
    order = patch_order("spiral", 4, 4).tolist()
    assert order[:5] == [5, 6, 10, 9, 8]
    # Raster position 0 is the corner diagonally above position 5, where the spiral begins.
    assert nearest_given("spiral", 4, 4, order.index(0), 5) == 0
    assert nearest_given("spiral", 4, 4, order.index(12), 5) == 4


def _program(rank: int, world_size: int, case: PatchCase, keys: dict[str, Any]) -> None:
    from megatron.generation import images
    from megatron.parallel.process_groups import form_groups

    images.initialize = form_groups
    images.complete_images(case.neox(world_size=world_size, **keys))


@pytest.mark.distributed
@pytest.mark.slow
def test_the_program_writes_pictures(tmp_path: Path) -> None:
    """From a checkpoint of two replicas, each of which continues its share."""
    from PIL import Image

    from tests.support.checkpoint_runs import STOP
    from tests.support.layouts import save_and_go_on
    from tests.support.made_images import import_archive

    case = PatchCase(heads=4, kv_heads=2, head_dim=8, layers=4, intermediate=40, seq=16, normalise="none")
    run_ranks(save_and_go_on, 1, case, (1, 1, 1), "fp32", str(tmp_path / "run"), 1 << 20)
    prefix = import_archive(tmp_path, "images", blobs(5, SIDE))
    completion = {"path": prefix, "count": 5, "given_patches": 6, "output": str(tmp_path / "out")}
    keys = {"load": str(tmp_path / "run"), "from_scratch": False, "iteration": STOP, "completion": completion}
    run_ranks(_program, 2, case, keys)
    with np.load(tmp_path / "out/completions.npz") as archive:
        completed = archive["completed"]
    cut = cut_patches(completed[3], case.size, "spiral")
    assert np.array_equal(cut[:6], cut_patches(blobs(5, SIDE)[3], case.size, "spiral")[:6])
    assert np.isfinite(completed).all()
    assert Image.open(tmp_path / "out/completions.png").size[1] > 5 * SIDE
