"""Ambiguous folders are rejected, folders of other trainers are recognized, and provenance is carried over."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron.checkpoint.manifest import Manifest, read_manifest, write_manifest
from tests.support.checkpoints import SHAPE, write_weights
from tests.support.hf_folders import Model, write_hf
from tools.convert_hf.cli import main

pytestmark = pytest.mark.unit

MODEL = Model(heads=4, kv_heads=2, head_dim=8, intermediate=24, vocab=64)


@pytest.mark.parametrize("verb", ["to-neox", "inspect", "verify"])
def test_an_old_index_beside_a_newer_file_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    write_hf(tmp_path / "hf", MODEL, shards=2)
    write_hf(tmp_path / "newer", MODEL, shards=1)
    shutil.copy(tmp_path / "newer" / "model.safetensors", tmp_path / "hf")
    more = {"to-neox": ["--input", str(tmp_path / "hf"), "--output", str(tmp_path / "out"), "--tp", "1"]}
    words = more.get(verb, [str(tmp_path / "hf"), str(tmp_path / "newer")][: 2 if verb == "verify" else 1])
    assert main([verb, *words]) == 2
    said = capsys.readouterr().err
    assert "model.safetensors.index.json and model.safetensors" in said
    (tmp_path / "hf" / "model.safetensors.index.json").unlink()  # as the message says: all but one set
    for path in (tmp_path / "hf").glob("model-*.safetensors"):
        path.unlink()
    assert main([verb, *words]) == 0


def test_weight_files_that_nothing_lists_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "hf", MODEL, shards=1)
    (tmp_path / "hf" / "model-00009-of-00009.safetensors").write_bytes(b"")
    assert main(["inspect", str(tmp_path / "hf")]) == 0
    assert "1 weight file not listed in model.safetensors: model-00009" in capsys.readouterr().out


def test_a_zero_3_folder_of_the_trainer_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "global_step5"
    folder.mkdir()
    (folder / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"")
    (tmp_path / "latest").write_text("global_step5")
    assert main(["inspect", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "DeepSpeed ZeRO-3" in said
    assert len(said.splitlines()) == 1


def test_a_reshard_carries_what_a_run_is_compared_with(tmp_path: Path) -> None:
    folder = write_weights(tmp_path / "a", tp=2, shape=SHAPE)
    before = read_manifest(folder)
    known = {"data": {"x": {"hash": "1"}}, "facts": {"model": {"num_layers": 2}, "run": {"seed": 1}}}
    write_manifest(folder, Manifest(before.files, {**before.provenance, "shape": asdict(SHAPE), **known}))
    config = ["--input", str(tmp_path / "a"), "--output", str(tmp_path / "b"), "--tp", "1"]
    assert main(["reshard", *config]) == 0
    provenance = read_manifest(tmp_path / "b" / "global_step0").provenance
    assert {key: provenance[key] for key in known} == known
