"""Every kind of input leads to the same model: .bin, Meta's files, sequential layout, old names, tied, padded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.converter_inputs import training_arguments, write_meta, write_neox_pipeline, write_neox_sequential
from tests.support.hf_folders import ROPE, Model, convert, read_hf, same, write_hf
from tests.support.neox_oracle import neox_files

pytestmark = pytest.mark.unit


def to_hf(source: Path, tmp_path: Path, *more: Any) -> dict[str, Tensor]:
    convert("to-hf", "--input", source, "--output", tmp_path / "out", *more)
    return read_hf(tmp_path / "out")


def _bin_folder(folder: Path, model: Model, shards: int) -> dict[str, Tensor]:
    state = write_hf(folder, model)
    (folder / "model.safetensors").unlink()
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(model.layers)}
    everything = state | old
    if shards == 1:
        torch.save(everything, folder / "pytorch_model.bin")
        return state
    names, weight_map = list(everything), {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        torch.save({n: everything[n] for n in names[i::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return state


@pytest.mark.parametrize("shards", [1, 3])
def test_pytorch_bin(shards: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = _bin_folder(tmp_path / "bin", Model(), shards)
    assert same(to_hf(tmp_path / "bin", tmp_path), state)
    assert "rotary_emb.inv_freq" in capsys.readouterr().out


def test_bin_with_parameters_and_views(tmp_path: Path) -> None:
    """Parameters, and tensors that share a storage, as saved by older scripts."""
    state = _bin_folder(tmp_path / "bin", Model(), 1)
    q, k = (f"model.layers.0.self_attn.{p}_proj.weight" for p in "qk")
    joined = torch.cat([state[q], state[k]])
    saved = {n: torch.nn.Parameter(t) for n, t in state.items()} | {
        q: joined[: len(state[q])],
        k: joined[len(state[q]) :],
    }
    torch.save(saved, tmp_path / "bin" / "pytorch_model.bin")
    assert same(to_hf(tmp_path / "bin", tmp_path), state)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("columns", [False, True])
def test_meta(shards: int, columns: bool, tmp_path: Path) -> None:
    model = Model(head_dim=8)
    state = model.state()
    params = {"rope_theta": 500000.0, "use_scaled_rope": True}
    write_meta(tmp_path / "meta", model, state, shards, columns, **params)
    scaling = "rope_scaling=" + json.dumps(ROPE)
    assert same(to_hf(tmp_path / "meta", tmp_path, "--set", scaling), state)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {k: v for k, v in model.config().items() if k in config and k != "max_position_embeddings"}
    assert {k: config[k] for k in expected} == expected
    assert config["max_position_embeddings"] == 131072
    assert (tmp_path / "out" / "LICENSE").read_text() == "community license"
    convert("to-neox", "--input", tmp_path / "meta", "--output", tmp_path / "neox", "--tp", 2, "--set", scaling)
    convert("verify", tmp_path / "out", tmp_path / "neox")


def test_meta_without_a_known_rope_factor_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Meta's code has one factor for all models; in the published configs it differs."""
    model = Model(head_dim=8)
    write_meta(tmp_path / "meta", model, model.state(), 1, False, rope_theta=500000.0, use_scaled_rope=True)
    convert("to-hf", "--input", tmp_path / "meta", "--output", tmp_path / "out", expect=2)
    assert "rope_scaling is missing" in capsys.readouterr().err


def test_meta_llama2(tmp_path: Path) -> None:
    model = Model(kv_heads=8, head_dim=8, vocab=32000 // 16)
    write_meta(tmp_path / "meta", model, model.state(), 2, True, vocab_size=-1)
    state = to_hf(tmp_path / "meta", tmp_path, "--set", "max_position_embeddings=4096")
    assert same(state, model.state())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"], config["num_key_value_heads"]) == (10000.0, None, 8)


def test_meta_permutation_matches_half_split_rotation(tmp_path: Path) -> None:
    """Scores q.k of Meta's adjacent-pair rotation on its weights equal those of half-split rotation on ours."""
    model = Model(heads=2, kv_heads=2, head_dim=8, dtype=torch.float32)
    state = model.state()
    write_meta(tmp_path / "meta", model, state, 1, False, rope_theta=10000.0)
    options = ("--set", "max_position_embeddings=64")
    converted = to_hf(tmp_path / "meta", tmp_path, *options)
    meta = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    x = torch.randn(5, model.hidden, generator=torch.Generator().manual_seed(3))
    angles = torch.outer(torch.arange(5.0), 10000.0 ** (-torch.arange(0, 8, 2) / 8))

    def adjacent(w: Tensor) -> Tensor:
        pairs = torch.view_as_complex((x @ w.T).view(5, 2, 4, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(2)

    def halves(w: Tensor) -> Tensor:
        a, b = (x @ w.T).view(5, 2, 8).chunk(2, -1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    theirs = torch.einsum("snd,tnd->nst", *(adjacent(meta[f"layers.0.attention.w{p}.weight"]) for p in "qk"))
    ours = torch.einsum("snd,tnd->nst", *(halves(converted[f"model.layers.0.self_attn.{p}_proj.weight"]) for p in "qk"))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("tp", [1, 2])
def test_sequential_layout(tp: int, tmp_path: Path) -> None:
    model = Model()
    state = write_hf(tmp_path / "hf", model)
    write_neox_sequential(tmp_path / "neox", model, state, tp)
    assert same(to_hf(tmp_path / "neox", tmp_path, "--hf-source", tmp_path / "hf"), state)


@pytest.mark.parametrize("kv_heads", [2, 8])
def test_gpt_neox_checkpoint_without_manifest(
    kv_heads: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `_extra_state: None` entries, grouped or per-head packing, and a padded vocabulary."""
    model = Model(kv_heads=kv_heads)
    state = write_hf(tmp_path / "hf", model)
    files: dict[str, dict[str, Any]] = neox_files(state, model.heads, kv_heads, 2, 16)
    for tensors in files.values():
        tensors["attention.dense._extra_state"] = None
    write_neox_pipeline(tmp_path / "neox", files, model, 2)
    assert same(to_hf(tmp_path / "neox", tmp_path, "--hf-source", tmp_path / "hf"), state)
    assert "no manifest" in capsys.readouterr().out
    convert("inspect", tmp_path / "neox")
    out = capsys.readouterr().out
    assert f"{kv_heads} key/value" in out
    assert "config.json (needed by to-hf" in out


def test_reshard_without_config(tmp_path: Path) -> None:
    """Without config.json the true vocabulary is unknown: all stored rows are kept."""
    model = Model()
    files = neox_files(model.state(), model.heads, model.kv_heads, 2, 1)
    write_neox_pipeline(tmp_path / "neox", files, model, 2)
    convert("reshard", "--input", tmp_path / "neox", "--output", tmp_path / "one", "--tp", 1)
    found = {p.name: torch.load(p, weights_only=True) for p in (tmp_path / "one" / "global_step7").glob("layer_*")}
    expected = neox_files(model.state(), model.heads, model.kv_heads, 1, 1)
    assert found.keys() == expected.keys()
    assert all(same(found[n], expected[n]) for n in found)


def test_legacy_mlp_names(tmp_path: Path) -> None:
    model = Model()
    state = write_hf(tmp_path / "hf", model)
    files = neox_files(state, model.heads, model.kv_heads, 2, 1)
    for tensors in files.values():
        if "mlp.linear1.weight" in tensors:
            up, gate = tensors.pop("mlp.linear1.weight").chunk(2)
            down = tensors.pop("mlp.linear2.weight")
            tensors |= {"mlp.w1.weight": gate.clone(), "mlp.w3.weight": up.clone(), "mlp.w2.weight": down}
    write_neox_pipeline(tmp_path / "neox", files, model, 2)
    assert same(to_hf(tmp_path / "neox", tmp_path, "--hf-source", tmp_path / "hf"), state)


def test_config_of_newer_transformers(tmp_path: Path) -> None:
    """`rope_parameters` in place of rope_theta and rope_scaling."""
    model = Model()
    write_hf(tmp_path / "hf", model)
    config = model.config()
    config["rope_parameters"] = config.pop("rope_scaling") | {"rope_theta": config.pop("rope_theta")}
    config["dtype"] = config.pop("torch_dtype")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    convert("to-neox", "--input", tmp_path / "hf", "--output", tmp_path / "neox", "--tp", 1)
    text = (tmp_path / "neox" / "model.yml").read_text()
    assert "rotary_emb_base: 500000\n" in text
    assert "  original_max_position_embeddings: 64\n" in text
    to_hf(tmp_path / "neox", tmp_path)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


def test_llama2_config_reports_missing_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Llama-2's published config has no rope_theta: it is required once, recorded, and not required again."""
    write_hf(tmp_path / "hf", Model(kv_heads=8))
    config = {k: v for k, v in Model(kv_heads=8).config().items() if k != "rope_theta"}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"rope_scaling": None}))
    common = ("--input", tmp_path / "hf", "--output", tmp_path / "neox", "--tp", 2)
    convert("to-neox", *common, expect=2)
    assert "--set rope_theta=" in capsys.readouterr().err
    convert("to-neox", *common, "--set", "rope_theta=10000")
    assert same(to_hf(tmp_path / "neox", tmp_path), read_hf(tmp_path / "hf"))
    assert "rope_theta" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_tied_model_that_stores_its_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model(tied=True)
    state = model.state()
    head = {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
    write_hf(tmp_path / "hf", model, state | head)
    convert("to-neox", "--input", tmp_path / "hf", "--output", tmp_path / "neox", "--tp", 2)
    assert not list((tmp_path / "neox").rglob("layer_06*"))
    assert same(to_hf(tmp_path / "neox", tmp_path), state)
    head["lm_head.weight"][0, 0] += 1
    write_hf(tmp_path / "wrong", model, state | head)
    convert("to-neox", "--input", tmp_path / "wrong", "--output", tmp_path / "no", "--tp", 2, expect=2)
    assert "tie_word_embeddings is true, but lm_head.weight differs" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_tied_model_with_a_neox_head_file(tmp_path: Path) -> None:
    """GPT-NeoX's converter writes a head for tied models; it is dropped if it equals the embedding."""
    model = Model(tied=True)
    state = write_hf(tmp_path / "hf", model)
    untied = state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
    write_neox_pipeline(tmp_path / "neox", neox_files(untied, model.heads, model.kv_heads, 2, 1), model, 2)
    assert same(to_hf(tmp_path / "neox", tmp_path, "--hf-source", tmp_path / "hf"), state)
    untied["lm_head.weight"] = untied["lm_head.weight"].flip(0)
    write_neox_pipeline(tmp_path / "two", neox_files(untied, model.heads, model.kv_heads, 2, 1), model, 2)
    out = ("--output", tmp_path / "no", "--hf-source", tmp_path / "hf")
    convert("to-hf", "--input", tmp_path / "two", *out, expect=2)


def test_exported_shards_follow_the_source_or_the_size(tmp_path: Path) -> None:
    model = Model()
    write_hf(tmp_path / "hf", model, shards=3)
    convert("to-neox", "--input", tmp_path / "hf", "--output", tmp_path / "neox", "--tp", 2)
    convert("to-hf", "--input", tmp_path / "neox", "--output", tmp_path / "like")
    index = "model.safetensors.index.json"
    assert (
        json.loads((tmp_path / "like" / index).read_text())["weight_map"]
        == (json.loads((tmp_path / "hf" / index).read_text())["weight_map"])
    )
    convert("to-hf", "--input", tmp_path / "neox", "--output", tmp_path / "small", "--shard-size", "4KB")
    weights = {p.name: p.stat().st_size for p in (tmp_path / "small").glob("*.safetensors")}
    assert set(json.loads((tmp_path / "small" / index).read_text())["weight_map"].values()) == set(weights)
    assert len(weights) > 3
    mode = (tmp_path / "small" / "config.json").stat().st_mode
    assert all(p.stat().st_mode == mode for p in (tmp_path / "small").glob("*.safetensors"))


def test_position_survives_resharding(tmp_path: Path) -> None:
    """A resharded training checkpoint can be continued with `no_load_optim`: it keeps the training position."""
    model = Model()
    files = neox_files(model.state(), model.heads, model.kv_heads, 2, 1)
    tag = write_neox_pipeline(tmp_path / "neox", files, model, 2)
    position = {
        "iteration": 7,
        "consumed_samples": 1792,
        "lr_scheduler": {"num_iters": 7, "min_lr": 1e-6},
        "global_steps": 7,
        "global_samples": 1792,
        "skipped_steps": 1,
    }
    meta = {
        "module": None,
        "mp_world_size": 2,
        "args": training_arguments(model, 2),
        "np_rng_state": np.random.get_state(),
    }
    torch.save(meta | position, tag / "mp_rank_00_model_states.pt")
    convert("reshard", "--input", tmp_path / "neox", "--output", tmp_path / "one", "--tp", 1)
    written = torch.load(tmp_path / "one" / "global_step7" / "mp_rank_00_model_states.pt", weights_only=True)
    assert written.items() >= position.items()
    assert written["mp_world_size"] == 1


def test_folder_of_a_trainer_that_also_has_latest(tmp_path: Path) -> None:
    """Hugging Face's trainer with DeepSpeed leaves `latest` next to safetensors; the safetensors are the model."""
    state = write_hf(tmp_path / "hf", Model())
    (tmp_path / "hf" / "latest").write_text("global_step5")
    (tmp_path / "hf" / "global_step5").mkdir()
    assert same(to_hf(tmp_path / "hf", tmp_path), state)
