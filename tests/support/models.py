"""Small Hugging Face Llamas for tests, the same models as NeoX arguments, and copies of their weights.

Imported by tests in the pytest process and inside ranks; transformers is imported only where it is used.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from examples.llama_keys import LLAMA
from megatron import layout
from megatron.engine.protocol import Engine, PipelineStage
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.place import Place


def llama3_rope(factor: float, original: int) -> tuple[tuple[str, Any], ...]:
    """A rope_scaling mapping as hashable items."""
    return (
        ("rope_type", "llama3"),
        ("factor", factor),
        ("low_freq_factor", 1.0),
        ("high_freq_factor", 4.0),
        ("original_max_position_embeddings", original),
    )


LLAMA3_ROPE = llama3_rope(8.0, 64)


@dataclass(frozen=True)
class Case:
    """A Llama small enough for a test; `rope` is None or the items of a rope_scaling mapping."""

    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 16
    layers: int = 2
    intermediate: int = 88
    vocab: int = 160
    tied: bool = False
    rope: tuple[tuple[str, Any], ...] | None = None
    theta: float = 10000.0
    eps: float = 1e-5
    seq: int = 48

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    def neox(self, **overrides: Any) -> NeoXArgs:
        """NeoXArgs of the case; the override `world_size` sets the number of ranks."""
        world_size = overrides.pop("world_size", None)
        keys: dict[str, Any] = {
            "num_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_kv_heads": self.kv_heads,
            "intermediate_size": self.intermediate,
            **LLAMA,
            "vocab_size": self.vocab,
            "make_vocab_size_divisible_by": 1,
            "seq_length": self.seq,
            "max_position_embeddings": self.seq,
            "rotary_emb_base": int(self.theta),
            "rms_norm_epsilon": self.eps,
            "no_weight_tying": not self.tied,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "train_iters": 5,
            "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8}},
            "lr_decay_style": "constant",
            "warmup": 0.0,
            "weight_decay": 0.1,
            "gradient_clipping": 1.0,
            "precision": "fp32",
            "distributed_backend": "gloo",
            "from_scratch": True,
            "train_data_paths": ["unused"],
            "kernels": os.environ.get("NEOX_TEST_KERNELS", "auto"),
            "engine": os.environ.get("NEOX_TEST_ENGINE", "deepspeed"),
        }
        if self.rope is not None:
            keys["rope_scaling"] = dict(self.rope)
        keys.update(overrides)
        return NeoXArgs.from_dict(keys, world_size=world_size)

    def hugging_face(self, seed: int = 0) -> Any:
        """A random `LlamaForCausalLM` in fp32 with norm weights that are not 1, so that swapped norms are detected."""
        from transformers import LlamaConfig, LlamaForCausalLM

        rope: dict[str, Any] = {"rope_type": "default"} if self.rope is None else dict(self.rope)
        config = LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            vocab_size=self.vocab,
            tie_word_embeddings=self.tied,
            max_position_embeddings=self.seq,
            rope_parameters={**rope, "rope_theta": self.theta},
            rms_norm_eps=self.eps,
            attention_dropout=0.0,
        )
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.normal_(1.0, 0.2)
                else:
                    parameter.normal_(0.0, 0.02)
        return model.eval()


def rank_part(row: layout.TensorRow, sources: list[Tensor], args: NeoXArgs, tp: int, tp_rank: int) -> Tensor:
    """This rank's tensor of a table row, cut from whole HF tensors."""
    if row.replicated:
        return sources[0]
    parts = []
    for piece in layout.rank_slices(row, args.shape, tp, tp_rank):
        if piece.source is None:
            parts.append(sources[0].new_zeros(len(piece), *sources[0].shape[1:]))
        else:
            parts.append(sources[piece.source].narrow(row.shard_dim, piece.start, len(piece)))
    return torch.cat(parts, dim=row.shard_dim)


@torch.no_grad()
def fill_stage(stage: PipelineStage, place: Place, state: dict[str, Tensor], args: NeoXArgs) -> None:
    """Copy a whole HF state dict into this rank's pipeline stage."""
    for index, layer in stage.numbered_layers():
        parameters = dict(layer.named_parameters())
        for row in layout.rows_of(index, args.shape):
            names = [name.format(layer=index - 2) for name in row.hf]
            part = rank_part(row, [state[name] for name in names], args, place.tp, place.tp_rank)
            parameters.pop(row.neox).copy_(part)
        left = [name for name in parameters if not layout.is_factor(name)]  # adapters are filled separately
        assert not left, left


def load_hugging_face(engine: Engine, state: dict[str, Tensor], args: NeoXArgs) -> None:
    """Copy a whole HF state dict into an engine."""
    fill_stage(engine, engine.place, state, args)
    engine.weights_changed()


def gathered(local: Tensor, group: Any) -> Tensor:
    """All-gather a tensor over the group along its last dimension."""
    parts = [torch.empty_like(local) for _ in range(group.size())]
    torch.distributed.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts, dim=-1)
