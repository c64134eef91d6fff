"""Vectors of images equal the hidden states of a plain `transformers` model, on both engines and at every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.neox_arguments.keys.embeddings import EmbedKeys
from tests.support.made_images import blobs, import_archive
from tests.support.patch_models import PatchCase
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

CASE = PatchCase(
    heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=48, seq=15, normalise="none", positions="learned"
)
IMAGES = 7
SPLITS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2pp2": (4, {"model_parallel_size": 2, "pipe_parallel_size": 2, "sequence_parallel": True, "seq_length": 16}),
    "megatron": (2, {"engine": "megatron", "pipe_parallel_size": 2}),
    "dp2": (2, {}),
}


def _embed(rank: int, world_size: int, split: dict[str, Any], keys: dict[str, Any]) -> Any:
    from megatron.evaluation.driver import drive
    from megatron.evaluation.embeddings.run import embed_and_write
    from megatron.supervision.status_store import Whereabouts
    from tests.support.engine_runs import inference

    args = CASE.neox(world_size=world_size, **{**split, "max_position_embeddings": 16})
    args = args.model_copy(update={"embed": EmbedKeys(**keys), "sequence_parallel": False})
    engine = inference(args, dict(model().state_dict()))
    return drive(engine, args, Whereabouts(), lambda driven: embed_and_write(driven, None))


def model() -> Any:
    from dataclasses import replace

    return replace(CASE, seq=16).hugging_face()


@pytest.mark.parametrize(
    "layout", ["tp2pp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("megatron", "dp2"))]
)
def test_vectors_of_images_equal_transformers(layout: str, tmp_path: Path) -> None:
    """Mean over the patches read, in spiral order; the last patch is included if it is read."""
    from megatron.data.patch_form import cut_patches

    images = blobs(IMAGES, 16)
    prefix = import_archive(tmp_path, "galaxies", images, ids=np.array([f"g{n}" for n in range(IMAGES)]))
    ranks, split = SPLITS[layout]
    output = tmp_path / "vectors.npy"
    keys = {"input": prefix, "output": str(output), "layers": "all"}
    report = run_ranks(_embed, ranks, split, keys)[0]
    read = split.get("seq_length", CASE.seq)
    raw = torch.from_numpy(np.stack([cut_patches(image, CASE.size, "spiral")[:read] for image in images]))
    with torch.no_grad():
        states = torch.stack(model().hidden_states(raw)).mean(2).transpose(0, 1).numpy()
    found = np.load(output)
    assert found.shape == (IMAGES, CASE.layers + 1, CASE.hidden)
    assert np.abs(found - states).max() < 1e-5
    assert [json.loads(line)["id"] for line in (tmp_path / "vectors.ids.jsonl").open()] == [
        f"g{n}" for n in range(IMAGES)
    ]
    assert (report["rows"], report["patches"], report["patch_settings"]["size"]) == (IMAGES, IMAGES * read, CASE.size)
    # Sensitivity of the limit: raster order, or one patch more or less, would be detected.
    raster = torch.from_numpy(np.stack([cut_patches(image, CASE.size, "raster")[:read] for image in images]))
    with torch.no_grad():
        other = model().hidden_states(raster)[-1].mean(1).numpy()
    assert np.abs(other - states[:, -1]).max() > 1e-3
