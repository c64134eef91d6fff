"""`verify` accepts equal checkpoints, and names each known converter bug, its layer and its cause."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.converter_inputs import write_neox_pipeline, write_neox_sequential
from tests.support.hf_folders import Model, convert, same, write_hf
from tests.support.neox_oracle import LayerFiles, neox_files

pytestmark = pytest.mark.unit

MODEL = Model(kv_heads=4, head_dim=8, intermediate=32, dtype=torch.float32)
LAYER = "model.layers.1."


def broken(tmp_path: Path, change: Callable[[LayerFiles, dict[str, Tensor]], Any], model: Model = MODEL) -> None:
    """An HF folder, and a NeoX checkpoint at TP2 with a modified layer 1 (file 3)."""
    state = write_hf(tmp_path / "hf", model)
    files = neox_files(state, model.heads, model.kv_heads, 2, 1)
    change(files, state)
    tag = write_neox_pipeline(tmp_path / "neox", files, model, 2)
    (tag / "hf").mkdir()
    (tag / "hf" / "config.json").write_text(json.dumps(model.config()))


def report(tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: Any, expect: int = 1) -> str:
    capsys.readouterr()
    convert("verify", tmp_path / "hf", tmp_path / "neox", *more, expect=expect)
    return capsys.readouterr().out


def third(files: LayerFiles) -> list[dict[str, Tensor]]:
    return [files[f"layer_03-model_{r:02d}-model_states.pt"] for r in range(2)]


def naive(files: LayerFiles, name: str, sources: list[Tensor]) -> None:
    for tensors, part in zip(third(files), torch.cat(sources).chunk(2), strict=True):
        assert tensors[name].shape == part.shape
        tensors[name] = part.clone()


def naive_qkv(files: LayerFiles, state: dict[str, Tensor]) -> None:
    naive(files, "attention.query_key_value.weight", [state[f"{LAYER}self_attn.{p}_proj.weight"] for p in "qkv"])


def naive_mlp(files: LayerFiles, state: dict[str, Tensor]) -> None:
    naive(files, "mlp.linear1.weight", [state[f"{LAYER}mlp.{p}_proj.weight"] for p in ("gate", "up")])


def naive_up_gate(files: LayerFiles, state: dict[str, Tensor]) -> None:
    naive(files, "mlp.linear1.weight", [state[f"{LAYER}mlp.{p}_proj.weight"] for p in ("up", "gate")])


def swapped_gate_up(files: LayerFiles, state: dict[str, Tensor]) -> None:
    for tensors in third(files):
        tensors["mlp.linear1.weight"] = torch.cat(tensors["mlp.linear1.weight"].chunk(2)[::-1])


def interleaved(files: LayerFiles, state: dict[str, Tensor]) -> None:
    """Query heads, key and value of one group after another, as GPT-NeoX wrote them before 2024-11."""
    q, k, v = (state[f"{LAYER}self_attn.{p}_proj.weight"] for p in "qkv")
    d, groups = MODEL.head_dim, MODEL.kv_heads
    parts = [m.view(groups, -1, d, MODEL.hidden) for m in (q, k, v)]
    naive(files, "attention.query_key_value.weight", [torch.cat(parts, dim=1).flatten(0, 2)])


def permuted(files: LayerFiles, state: dict[str, Tensor]) -> None:
    meta = dict(state)
    for p in "qk":
        name = f"{LAYER}self_attn.{p}_proj.weight"
        meta[name] = state[name].unflatten(0, (-1, 2, MODEL.head_dim // 2)).transpose(1, 2).flatten(0, 2)
    files |= {k: v for k, v in neox_files(meta, MODEL.heads, MODEL.kv_heads, 2, 1).items() if k.startswith("layer_03")}


def swapped_norms(files: LayerFiles, state: dict[str, Tensor]) -> None:
    for tensors in third(files):
        a, b = "input_layernorm.scale", "post_attention_layernorm.scale"
        tensors[a], tensors[b] = tensors[b], tensors[a]


def swapped_kv(files: LayerFiles, state: dict[str, Tensor]) -> None:
    local = MODEL.hidden // 2
    for tensors in third(files):
        mixed = tensors["attention.query_key_value.weight"]
        k, v = mixed[local:].chunk(2)
        tensors["attention.query_key_value.weight"] = torch.cat([mixed[:local], v, k])


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (naive_qkv, "[q; k; v] is cut naively into ranks"),
        (naive_mlp, "[gate; up] is cut naively into ranks"),
        (naive_up_gate, "[up; gate] is cut naively into ranks"),
        (swapped_gate_up, "gate and up are swapped"),
        (interleaved, "q, k, v are interleaved head by head (MHA packing)"),
        (permuted, "rows of q and k are in Meta's order"),
        (swapped_norms, "input_layernorm and post_attention_layernorm are swapped"),
        (swapped_kv, "k and v are swapped"),
    ],
)
def test_a_known_mistake_is_named(
    change: Callable[[LayerFiles, dict[str, Tensor]], None],
    cause: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken(tmp_path, change)
    out = report(tmp_path, capsys, "--forward")
    causes = [line for line in out.splitlines() if line.startswith("cause: ")]
    assert len(causes) == 1, out
    assert causes[0].startswith("cause: layer 1: ")
    assert cause in causes[0]
    assert "first to diverge (beyond 0.0001): layer 1\n" in out
    assert out.endswith("DIFFERENT\n")


def test_gqa_packing_of_an_mha_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-NeoX's own converter writes this for Llama-2-7B."""
    model = Model(kv_heads=8, head_dim=8, dtype=torch.float32)

    def change(files: LayerFiles, state: dict[str, Tensor]) -> None:
        q, k, v = (state[f"{LAYER}self_attn.{p}_proj.weight"].chunk(2) for p in "qkv")
        for rank, tensors in enumerate(third(files)):
            tensors["attention.query_key_value.weight"] = torch.cat([q[rank], k[rank], v[rank]])

    broken(tmp_path, change, model)
    assert "q, k, v are [q | k | v] in each rank (GQA packing)" in report(tmp_path, capsys)


def test_one_flipped_bit_in_one_norm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def flip(files: LayerFiles, state: dict[str, Tensor]) -> None:
        for tensors in third(files):
            scale = tensors["post_attention_layernorm.scale"] = tensors["post_attention_layernorm.scale"].clone()
            scale.view(torch.int32)[17] ^= 1

    broken(tmp_path, flip)
    out = report(tmp_path, capsys)
    assert f"{LAYER}post_attention_layernorm.weight: 1 of {MODEL.hidden} elements differ" in out
    assert "first at row 17, column 0" in out
    assert "none of the known patterns" in out


def test_a_bit_flipped_on_one_rank_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def flip(files: LayerFiles, state: dict[str, Tensor]) -> None:
        tensors = third(files)[1]
        tensors["input_layernorm.scale"] = tensors["input_layernorm.scale"].clone()
        tensors["input_layernorm.scale"].view(torch.int32)[3] ^= 1 << 20

    broken(tmp_path, flip)
    out = report(tmp_path, capsys)
    assert f"{LAYER}input_layernorm.weight: not the same on all tensor-parallel ranks" in out
    convert("to-hf", "--input", tmp_path / "neox", "--output", tmp_path / "out", expect=2)
    error = capsys.readouterr().err
    assert "input_layernorm.scale differs between tensor-parallel ranks" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ("rms_norm_epsilon: 1.0e-05", "rms_norm_epsilon: 1.0e-06", "epsilon differs: 1e-05 and 1e-06"),
        ("rope_scaling:", "unused:", "rope scaling is missing in"),
        ("factor: 8.0", "factor: 32.0", "rope scaling differs"),
        ("rotary_emb_base: 500000", "rotary_emb_base: 10000", "rotary base differs: 500000.0 and 10000.0"),
    ],
)
def test_settings_that_are_not_visible_in_tensors(
    old: str, new: str, cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_hf(tmp_path / "hf", MODEL)
    convert("to-neox", "--input", tmp_path / "hf", "--output", tmp_path / "neox", "--tp", 2)
    path = tmp_path / "neox" / "model.yml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    out = report(tmp_path, capsys, "--forward")
    assert f"all {len(MODEL.state())} tensors are equal" in out
    assert f"cause: {cause}" in out
    assert "first to diverge (beyond 0.0001): layer 0\n" in out
    convert("to-hf", "--input", tmp_path / "neox", "--output", tmp_path / "out", expect=2)
    assert "would not be the trained one" in capsys.readouterr().err
    convert("to-hf", "--input", tmp_path / "neox", "--output", tmp_path / "out", "--trained-settings")
    capsys.readouterr()
    convert("verify", tmp_path / "neox", tmp_path / "out", "--forward")


@pytest.mark.parametrize("tied", [False, True])
def test_equal_checkpoints_of_all_kinds(tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model(tied=tied)
    state = write_hf(tmp_path / "hf", model)
    for tp in (1, 2):
        convert("to-neox", "--input", tmp_path / "hf", "--output", tmp_path / f"tp{tp}", "--tp", tp)
    write_neox_sequential(tmp_path / "sequential", model, state, 2)
    for other in ("tp1", "tp2", "sequential"):
        capsys.readouterr()
        forward = () if other == "sequential" else ("--forward",)
        convert("verify", tmp_path / "hf", tmp_path / other, *forward)
        assert capsys.readouterr().out.endswith("EQUAL\n")
    convert("verify", tmp_path / "tp1", tmp_path / "tp2")


def test_a_cast_is_within_tolerance_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "hf", MODEL)
    convert("to-neox", "--input", tmp_path / "hf", "--output", tmp_path / "neox", "--tp", 2, "--dtype", "bf16")
    out = report(tmp_path, capsys, "--forward", "--tolerance", "0.05")
    assert "no layer diverges beyond 0.05" in out
    assert "none of the known patterns" in out


def test_own_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "hf", MODEL)
    convert("to-neox", "--input", tmp_path / "hf", "--output", tmp_path / "neox", "--tp", 2)
    convert("to-hf", "--input", tmp_path / "neox", "--output", tmp_path / "back")
    convert("verify", tmp_path / "neox")
    convert("verify", tmp_path / "back")
    path = tmp_path / "neox" / "global_step0" / "layer_02-model_01-model_states.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    capsys.readouterr()
    convert("verify", tmp_path / "neox", expect=1)
    assert str(path) in capsys.readouterr().out
    (tmp_path / "neox" / "global_step0" / "hf" / "LICENSE.txt").write_text("x")
    convert("verify", tmp_path / "neox", expect=2)


def test_tokens_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "hf", MODEL)
    convert("to-neox", "--input", tmp_path / "hf", "--output", tmp_path / "neox", "--tp", 2)
    tokens = tmp_path / "tokens"
    tokens.write_text("[3, 1, 4, 1, 5]\n")
    assert "forward pass of 5 tokens" in report(tmp_path, capsys, "--forward", "--tokens", tokens, expect=0)
    tokens.write_text("3 99999")
    convert("verify", tmp_path / "hf", tmp_path / "neox", "--forward", "--tokens", tokens, expect=2)
    assert "token ids must be between 0 and 49" in capsys.readouterr().err


def test_streamed_forward_equals_transformers(tmp_path: Path) -> None:
    import os

    from transformers import LlamaForCausalLM

    from tools.convert_hf.sources.opening import open_checkpoint
    from tools.convert_hf.stream.band_io import FilePool
    from tools.convert_hf.verify.forward import StreamedLlama

    write_hf(tmp_path / "hf", MODEL)
    convert("to-neox", "--input", tmp_path / "hf", "--output", tmp_path / "neox", "--tp", 2)
    reference = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokens = torch.randint(MODEL.vocab, (200,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = reference(tokens[None]).logits[0]
    checkpoint = open_checkpoint(tmp_path / "neox")
    settings = checkpoint.run_settings()
    assert settings is not None
    pool = FilePool(os.O_RDONLY)
    model = StreamedLlama(checkpoint, settings, pool, 1000, "cpu")
    with torch.no_grad():
        x = model.embed(tokens)
        for layer in range(MODEL.layers):
            x = model.layer(x, layer)
        ours = model.logits(x)
    pool.close()
    assert float((ours - theirs).abs().max()) < 1e-5
    assert same({"a": theirs.argmax(-1)}, {"a": ours.argmax(-1)})
