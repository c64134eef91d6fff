"""Checkpoints that the converter reads but does not write: Meta's files, and GPT-NeoX's without a manifest."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support.hf_folders import Model
from tests.support.neox_oracle import neox_files


def _pairs(matrix: Tensor, heads: int) -> Tensor:
    """Rows of q or k in Meta's order: adjacent pairs rotate together."""
    d = matrix.shape[0] // heads
    return matrix.view(heads, 2, d // 2, -1).transpose(1, 2).reshape(matrix.shape)


def write_meta(folder: Path, model: Model, state: dict[str, Tensor], shards: int, columns: bool, **params: Any) -> None:
    """Write a state as Meta's files; `columns` splits the embedding by columns, as for Llama-2."""
    folder.mkdir()
    for r in range(shards):
        rows = lambda t: t.chunk(shards)[r].clone()  # noqa: E731, B023
        cols = lambda t: t.chunk(shards, dim=1)[r].clone()  # noqa: E731, B023
        out = {"tok_embeddings.weight": (cols if columns else rows)(state["model.embed_tokens.weight"])}
        for i in range(model.layers):
            get = {n.split(f"layers.{i}.")[1]: t for n, t in state.items() if f"layers.{i}." in n}
            p = f"layers.{i}."
            out[p + "attention.wq.weight"] = rows(_pairs(get["self_attn.q_proj.weight"], model.heads))
            out[p + "attention.wk.weight"] = rows(_pairs(get["self_attn.k_proj.weight"], model.kv_heads))
            out[p + "attention.wv.weight"] = rows(get["self_attn.v_proj.weight"])
            out[p + "attention.wo.weight"] = cols(get["self_attn.o_proj.weight"])
            out[p + "feed_forward.w1.weight"] = rows(get["mlp.gate_proj.weight"])
            out[p + "feed_forward.w3.weight"] = rows(get["mlp.up_proj.weight"])
            out[p + "feed_forward.w2.weight"] = cols(get["mlp.down_proj.weight"])
            out[p + "attention_norm.weight"] = get["input_layernorm.weight"]
            out[p + "ffn_norm.weight"] = get["post_attention_layernorm.weight"]
        out["norm.weight"] = state["model.norm.weight"]
        out["output.weight"] = rows(state.get("lm_head.weight", state["model.embed_tokens.weight"]))
        out["rope.freqs"] = torch.ones(model.head_dim // 2)
        torch.save(out, folder / f"consolidated.{r:02d}.pth")
    values = {"dim": model.hidden, "n_layers": model.layers, "n_heads": model.heads, "norm_eps": 1e-5}
    if model.kv_heads != model.heads:
        values["n_kv_heads"] = model.kv_heads
    (folder / "params.json").write_text(json.dumps(values | {"vocab_size": model.vocab} | params))
    (folder / "LICENSE").write_text("community license")


def training_arguments(model: Model, tp: int) -> dict[str, Any]:
    """The part of the configuration saved by GPT-NeoX with the weights that the converter reads."""
    return {"num_attention_heads": model.heads, "num_layers": model.layers, "model_parallel_size": tp}


def write_neox_sequential(folder: Path, model: Model, state: dict[str, Tensor], tp: int) -> None:
    """Write a checkpoint of GPT-NeoX with pipe_parallel_size 0: all in mp_rank files, including random states."""
    tag = folder / "global_step7"
    tag.mkdir(parents=True)
    files = neox_files(state, model.heads, model.kv_heads, tp, 1)
    for rank in range(tp):
        module = {}
        for name, tensors in files.items():
            if f"model_{rank:02d}" in name:
                module |= {f"sequential.{int(name[6:8])}.{n}": t for n, t in tensors.items()}
        module |= {f"sequential.{i + 2}.attention.rotary_emb.inv_freq": torch.ones(2) for i in range(model.layers)}
        rng = {
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
        }
        meta = {"module": module, "mp_world_size": tp, "args": training_arguments(model, tp), "iteration": 7} | rng
        torch.save(meta, tag / f"mp_rank_{rank:02d}_model_states.pt")
    (folder / "latest").write_text("global_step7")


def write_neox_pipeline(folder: Path, files: dict[str, dict[str, Any]], model: Model, tp: int) -> Path:
    """Write a pipeline checkpoint of GPT-NeoX, without manifest and config.json; returns its folder."""
    tag = folder / "global_step7"
    tag.mkdir(parents=True)
    for name, tensors in files.items():
        torch.save(tensors, tag / name)
    torch.save(
        {"module": None, "mp_world_size": tp, "args": training_arguments(model, tp)}, tag / "mp_rank_00_model_states.pt"
    )
    (folder / "latest").write_text("global_step7")
    return tag
