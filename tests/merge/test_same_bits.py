"""The same bits for any threads, tiles, bands, shards, TP of inputs and output, order of models, and kills."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.hf_folders import Model, convert, read_hf, same, tag_files, write_hf
from tests.support.kills import killed_at
from tests.support.merge_sets import noise
from tests.support.merges import merge_to, merged_state, prepared, run_merge, write_recipe
from tools.convert_hf.stream import copy
from tools.merge import arithmetic, bands, job, measure

pytestmark = pytest.mark.unit

# Eight key/value heads, so that TP 8 is possible; an odd width of the MLP's columns.
MODEL = Model(layers=2, heads=8, kv_heads=8, head_dim=2, intermediate=24, vocab=40)
RECIPES: dict[str, dict[str, Any]] = {
    "dare_ties": {"rescale": "l1"},
    "ties": {},
    "slerp": {"t": 0.3},
}


def write_models(root: Path) -> None:
    import torch

    for number, folder in enumerate(("base", "a", "b", "c")):
        state = {}
        for name, like in MODEL.state().items():
            values = 0.05 * noise(name, tuple(like.shape)) + 0.004 * number * noise(
                f"{number} {name}", tuple(like.shape)
            )
            state[name] = torch.from_numpy(values).bfloat16()
        write_hf(root / folder, MODEL, state)


def recipe_of(method: str, folders: list[str]) -> dict[str, Any]:
    weights = {"a": 0.6, "b": 0.3, "c": 0.1}
    base, *models = folders
    entries = []
    for folder in models if method != "slerp" else models[:1]:
        label = Path(folder).name.removesuffix("_tp")
        parameters = {} if method == "slerp" else {"weight": weights[label], "density": 0.4}
        entries.append({"model": folder, "label": label, "parameters": parameters})
    return {
        "merge_method": method,
        "base_model": {"model": base, "label": "base"},
        "models": entries,
        "parameters": RECIPES[method],
        **({"random_seed": 5} if method == "dare_ties" else {}),
    }


@pytest.mark.parametrize("method", RECIPES)
def test_threads_tiles_shards_and_order(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_models(tmp_path)
    folders = [str(tmp_path / name) for name in ("base", "a", "b", "c")]
    recipe = write_recipe(tmp_path / "merge.yml", recipe_of(method, folders))
    whole = merge_to(recipe, tmp_path / "x" / "out", "--threads", 1, "--shard-size", 2000)
    expected = tag_files(whole)
    assert len([name for name in expected if name.endswith(".safetensors")]) > 3

    # Bands of a few rows, tiles of one.
    monkeypatch.setattr(job, "_LARGEST_BAND", 256)
    monkeypatch.setattr(job, "_SMALLEST_BAND", 256)
    for threads, tile in ((2, 16), (4, 48)):
        monkeypatch.setattr(bands, "TILE", tile)
        out = merge_to(recipe, tmp_path / f"{threads}" / "out", "--threads", threads, "--shard-size", 2000)
        assert tag_files(out) == expected  # card and report as well

    monkeypatch.setattr(job, "_LARGEST_BAND", 4 << 20)
    monkeypatch.setattr(job, "_SMALLEST_BAND", 4 << 20)
    out = tmp_path / "shared" / "out"
    for share in (2, 3, 1):
        assert not out.exists()
        merge_to(recipe, out, "--shard", f"{share}/3", "--shard-size", 2000)
    assert tag_files(out) == expected

    body = recipe_of(method, folders)
    body["models"].reverse()
    turned = merge_to(write_recipe(recipe, body), tmp_path / "turned" / "out", "--shard-size", 2000)
    assert tag_files(turned) == expected


def test_other_piece_sizes_agree_within_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements of a whole tensor are exact: other pieces give the same sums within fp32 rounding."""
    write_models(tmp_path)
    folders = [str(tmp_path / name) for name in ("base", "a", "b", "c")]
    results = []
    for number, elements in enumerate((1 << 16, 32)):
        monkeypatch.setattr(measure, "_ELEMENTS", elements)
        recipe = write_recipe(tmp_path / "merge.yml", recipe_of("ties", folders))
        results.append(read_hf(merge_to(recipe, tmp_path / f"out{number}")))
    assert same(*results)


def test_a_mask_that_depends_on_the_tile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparisons above can fail: with an index relative to the tile instead of the tensor."""
    write_models(tmp_path)
    body = recipe_of("dare_ties", [str(tmp_path / name) for name in ("base", "a", "b", "c")]) | {"parameters": {}}
    assert same(merged_state(body, tile=16), merged_state(body, tile=1 << 16))
    keep = arithmetic.keep_mask
    monkeypatch.setattr(arithmetic, "keep_mask", lambda key, start, count, limit: keep(key, 0, count, limit))
    assert not same(merged_state(body, tile=16), merged_state(body, tile=1 << 16))


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_any_tensor_parallel_size(tp: int, tmp_path: Path) -> None:
    """With NeoX checkpoints as parents and output, the model equals that from Hugging Face folders."""
    write_models(tmp_path)
    names = ("base", "a", "b", "c")
    for name in names:
        convert("to-neox", "--input", tmp_path / name, "--output", tmp_path / f"{name}_tp", "--tp", tp)
    plain = write_recipe(tmp_path / "hf.yml", recipe_of("dare_ties", [str(tmp_path / n) for n in names]))
    split = write_recipe(tmp_path / "neox.yml", recipe_of("dare_ties", [str(tmp_path / f"{n}_tp") for n in names]))
    expected = read_hf(merge_to(plain, tmp_path / "out"))
    assert same(read_hf(merge_to(split, tmp_path / "from_neox")), expected)
    merge_to(plain, tmp_path / "as_neox", "--tp", tp)
    convert("to-hf", "--input", tmp_path / "as_neox", "--output", tmp_path / "back")
    assert same(read_hf(tmp_path / "back"), expected)
    run_merge(split, "--verify", tmp_path / "as_neox")
    run_merge(plain, "--verify", tmp_path / "from_neox")
    # Merging straight to NeoX writes what converting the merged model writes, byte for byte.
    convert("to-neox", "--input", tmp_path / "out", "--output", tmp_path / "later", "--tp", tp)
    for file in sorted((tmp_path / "later" / "global_step0").glob("layer_*.pt")):
        assert file.read_bytes() == (tmp_path / "as_neox" / "global_step0" / file.name).read_bytes()


def test_killed_and_resumed_at_ten_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL before a change to the file system, then --resume: the folder equals that of an undisturbed run."""
    monkeypatch.setattr(job, "_LARGEST_BAND", 512)
    monkeypatch.setattr(job, "_SMALLEST_BAND", 512)
    monkeypatch.setattr(copy, "SYNC_SECONDS", 0.0)
    recipe = prepared(tmp_path, "gqa", "dare_ties 0.53")
    expected = tag_files(merge_to(recipe, tmp_path / "whole" / "out", "--threads", 2))
    killed = 0
    for moment in (1, 2, 4, 7, 11, 18, 30, 45, 60, 75):
        out = tmp_path / f"killed{moment}" / "out"
        killed += killed_at(moment, lambda out=out: merge_to(recipe, out, "--threads", 2))  # type: ignore[misc]
        assert tag_files(merge_to(recipe, out, "--threads", 2, "--resume", "--force")) == expected
        assert not out.with_name("out.partial").exists()
    assert killed == 10


def test_resume_repeats_nothing_and_refuses_other_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(copy, "SYNC_SECONDS", 0.0)
    recipe = prepared(tmp_path, "gqa", "dare_ties 0.5")
    out = tmp_path / "out"
    read, done = bands.MergedBands.read, [0]

    def stops(self: bands.MergedBands, *rest: Any) -> Any:
        done[0] += 1
        if done[0] == 6:  # only one signal: a second would interrupt the shutdown
            os.kill(os.getpid(), signal.SIGTERM)
        elif done[0] > 6:  # give the main thread time to handle it
            threading.Event().wait(1.0)
        return read(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(bands.MergedBands, "read", stops)
        run_merge(recipe, "--output", out, "--threads", 1, expect=130)
    assert "--resume continues" in capsys.readouterr().err
    assert not out.exists()
    run_merge(recipe, "--output", out, expect=2)
    assert "continue it with --resume" in capsys.readouterr().err

    body = yaml.safe_load(recipe.read_text())
    other = write_recipe(tmp_path / "other.yml", body | {"random_seed": 8})
    run_merge(other, "--output", out, "--resume", expect=2)
    assert "started from other files or with other options" in capsys.readouterr().err

    resumed: list[str] = []

    def counts(self: bands.MergedBands, one: Any, band: memoryview) -> Any:
        resumed.append(one.tensor.name)
        return read(self, one, band)

    monkeypatch.setattr(bands.MergedBands, "read", counts)
    merge_to(recipe, out, "--resume")
    tensors = len(read_hf(out))
    assert 0 < len(resumed) < tensors  # some had been recorded
