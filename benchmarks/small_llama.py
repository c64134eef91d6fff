"""Shared parts of the training benchmarks: a Llama of a chosen size, random samples, and steps of the real engine.

Importing it imports torch only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from examples.llama_keys import LLAMA
from megatron import layout
from megatron.neox_arguments import NeoXArgs

if TYPE_CHECKING:
    from megatron.engine.protocol import Engine

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
THETA, EPS, HEAD_DIM = 500_000, 1e-5, 64


@dataclass(frozen=True)
class SmallLlama:
    """Heads of size 64, a quarter as many for keys and values, an MLP of 3.5 x hidden, Llama-3's rotary scaling."""

    hidden: int
    layers: int
    vocab: int
    seq: int

    @property
    def heads(self) -> int:
        return self.hidden // HEAD_DIM

    @property
    def kv_heads(self) -> int:
        return max(1, self.heads // 4)

    @property
    def intermediate(self) -> int:
        return self.hidden * 7 // 2

    def arguments(self, world_size: int = 1, **keys: Any) -> NeoXArgs:
        """Arguments for a run of `world_size` ranks; `keys` are additional GPT-NeoX keys."""
        own = {
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
            "rotary_emb_base": THETA,
            "rope_scaling": LLAMA3_ROPE,
            "rms_norm_epsilon": EPS,
            "no_weight_tying": True,
            "gradient_accumulation_steps": 1,
            "train_iters": 5,
            "optimizer": {"type": "Adam", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8}},
            "lr_decay_style": "constant",
            "warmup": 0.0,
            "weight_decay": 0.1,
            "gradient_clipping": 1.0,
            "from_scratch": True,
            "train_data_paths": ["unused"],
        }
        return NeoXArgs.from_dict(own | keys, world_size=world_size)

    def transformers_model(self) -> Any:
        """The same model built by transformers, in fp32 with random weights."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            vocab_size=self.vocab,
            tie_word_embeddings=False,
            max_position_embeddings=self.seq,
            rope_parameters={**LLAMA3_ROPE, "rope_theta": float(THETA)},
            rms_norm_eps=EPS,
            attention_dropout=0.0,
        )
        torch.manual_seed(0)
        return LlamaForCausalLM(config).float()


def random_samples(vocab: int, seq: int, count: int, seed: int = 7) -> list[dict[str, Tensor]]:
    """Samples of random tokens, each with a target at every position."""
    tokens = torch.randint(vocab, (count, seq + 1), generator=torch.Generator().manual_seed(seed))
    return [{"tokens": row[:-1], "labels": row[1:].clone()} for row in tokens]


def start_engine(
    args: NeoXArgs, device: torch.device, weights: dict[str, Tensor] | None = None, *, training: bool = True
) -> Engine:
    """This rank's engine with random weights, or, on a single rank, with those of a transformers model.

    Needs the default process group; creates the others.
    """
    from megatron.engine.build import build_engine, build_inference_engine
    from megatron.parallel.process_groups import form_groups

    engine = (build_engine if training else build_inference_engine)(args, form_groups(args, device))
    if weights is None:
        engine.initialize_weights()
    else:
        _copy(weights, engine, args)
    return engine


@torch.no_grad()
def _copy(weights: dict[str, Tensor], engine: Engine, args: NeoXArgs) -> None:
    """Pack Hugging Face tensors into the layers of a model that is not split."""
    for index, layer in engine.numbered_layers():
        for name, parameter in layer.named_parameters():
            row = layout.row_of(index, name, args.shape)
            sources = [weights[source.format(layer=index - 2)] for source in row.hf]
            if not row.replicated:
                assert row.shard_dim is not None
                pieces = layout.rank_slices(row, args.shape, 1, 0)
                parts = [sources[piece.source or 0].narrow(row.shard_dim, piece.start, len(piece)) for piece in pieces]
                sources = [torch.cat(parts, dim=row.shard_dim)]
            parameter.copy_(sources[0])
    engine.weights_changed()


def train_step(engine: Engine, args: NeoXArgs, samples: list[dict[str, Tensor]]) -> float:
    """One optimizer step on one global batch of `samples`; the loss."""
    from megatron.engine.batches import assemble_step

    engine.set_learning_rate(args.lr)
    place, micro = engine.place, args.train_micro_batch_size_per_gpu
    steps = len(samples) // (micro * place.dp)
    own = None
    if place.reads_data:
        starts = [(number * place.dp + place.dp_rank) * micro for number in range(steps)]
        own = [_stacked(samples[start : start + micro]) for start in starts]
    return engine.train_step(assemble_step(own, steps, place, "benchmark")).loss


def _stacked(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
