"""Random Llama folders for converter tests, written without transformers and without the converter."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.convert_hf.cli import main

ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
TEXT_FILES = {
    "tokenizer.json": '{"model": {"type": "WordLevel"}}\n',
    "tokenizer_config.json": '{"chat_template": "{{ messages }}"}\n',
    "generation_config.json": '{"eos_token_id": [5, 7], "temperature": 0.6}\n',
    "chat_template.jinja": "{% for m in messages %}{{ m }}{% endfor %}",
    "LICENSE.txt": "terms\r\nwith odd\tbytes\n",
}


@dataclass(frozen=True)
class Model:
    """A Llama of a few kilobytes."""

    layers: int = 2
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 4
    intermediate: int = 24
    vocab: int = 50
    tied: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 1,
            "eos_token_id": [5, 7],
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 512,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-05,
            "rope_scaling": dict(ROPE),
            "rope_theta": 500000.0,
            "some_future_field": {"kept": [1, 2.5, None]},
            "tie_word_embeddings": self.tied,
            "torch_dtype": str(self.dtype).removeprefix("torch."),
            "vocab_size": self.vocab,
        }

    def state(self, seed: int = 0) -> dict[str, Tensor]:
        """Random tensors under Hugging Face names; norms are not 1, so that swapped norms are detected."""
        generator = torch.Generator().manual_seed(seed)
        h, kv, f = self.hidden, self.kv_heads * self.head_dim, self.intermediate
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, h)}
        for i in range(self.layers):
            prefix = f"model.layers.{i}."
            shapes |= {
                prefix + "input_layernorm.weight": (h,),
                prefix + "self_attn.q_proj.weight": (h, h),
                prefix + "self_attn.k_proj.weight": (kv, h),
                prefix + "self_attn.v_proj.weight": (kv, h),
                prefix + "self_attn.o_proj.weight": (h, h),
                prefix + "post_attention_layernorm.weight": (h,),
                prefix + "mlp.gate_proj.weight": (f, h),
                prefix + "mlp.up_proj.weight": (f, h),
                prefix + "mlp.down_proj.weight": (h, f),
            }
        shapes["model.norm.weight"] = (h,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, h)
        return {
            name: (torch.randn(shape, generator=generator) * 0.05 + ("norm" in name)).to(self.dtype)
            for name, shape in shapes.items()
        }


def write_hf(folder: Path, model: Model, state: dict[str, Tensor] | None = None, shards: int = 1) -> dict[str, Tensor]:
    """Write a Hugging Face folder of `model`; returns its state."""
    state = model.state() if state is None else state
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.config(), indent=2) + "\n")
    for name, text in TEXT_FILES.items():
        (folder / name).write_bytes(text.encode())
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return state
    names = list(state)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        save_file({n: state[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return state


def read_hf(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    return state


def convert(*arguments: Any, expect: int = 0) -> None:
    """Run the converter in this process."""
    words = [str(a) for a in arguments]
    if words[0] != "inspect":
        words.append("--quiet")
    assert main(words) == expect


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal names, types and bits."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype
        and a[n].shape == b[n].shape
        and torch.equal(a[n].contiguous().view(torch.uint8), b[n].contiguous().view(torch.uint8))
        for n in a
    )


def tag_files(folder: Path) -> dict[str, bytes]:
    """The contents of every file below a folder, by relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
