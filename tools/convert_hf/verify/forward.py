"""The model's forward pass with weights streamed from disk: two checkpoints side by side in bounded memory.

Norms, rotary embedding and SwiGLU are the PyTorch reference ops of training. A matrix is never entirely in memory:
products are computed in bands of rows, and only activations are kept.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron.layout import EMBEDDING, HEAD
from megatron.model.rotary import inverse_frequencies
from megatron.ops.rms_norm import rms_norm
from megatron.ops.rotary import apply_rotary
from megatron.ops.swiglu import swiglu

from ..errors import ConvertError
from ..sources.checkpoint import Checkpoint
from ..sources.settings import Settings
from ..stream.band_io import FilePool, bands, read_band
from ..stream.tensor_map import Logical

_EMBEDDING, _HEAD = EMBEDDING[0].hf[0], HEAD[0].hf[0]


class StreamedLlama:
    """A Llama whose weights stay on disk. `settings` are the settings to run the checkpoint with."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, pool: FilePool, band: int, device: str) -> None:
        if settings.rms_norm_epsilon is None or settings.rotary_emb_base is None:
            raise ConvertError(
                f"{settings.origin} does not give rms_norm_epsilon and rotary_emb_base; --forward needs both"
            )
        self.checkpoint, self.settings, self.pool, self.band = checkpoint, settings, pool, band
        self.device = torch.device(device)
        self.epsilon = settings.rms_norm_epsilon
        self.shape = checkpoint.shape
        scaling = SimpleNamespace(**settings.rope_scaling) if settings.rope_scaling else None
        self.inv_freq = inverse_frequencies(self.shape.head_dim, settings.rotary_emb_base, scaling)  # type: ignore[arg-type]

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states [s, h] of token ids [s], in fp32."""
        table = self.checkpoint.tensors[_EMBEDDING]
        rows = {token: self._rows(table, token, token + 1) for token in sorted(set(tokens.tolist()))}
        return torch.cat([rows[token] for token in tokens.tolist()])

    def layer(self, x: Tensor, number: int) -> Tensor:
        """Decoder layer `number` of hidden states [s, h]."""
        prefix = f"model.layers.{number}."
        y = self._norm(x, prefix + "input_layernorm.weight")
        x = x + self._attention(y, prefix + "self_attn.")
        y = self._norm(x, prefix + "post_attention_layernorm.weight")
        fused = torch.cat([self._product(y, f"{prefix}mlp.{p}_proj.weight") for p in ("up", "gate")], dim=-1)
        return x + self._product(swiglu(fused), prefix + "mlp.down_proj.weight")

    def logits(self, x: Tensor) -> Tensor:
        """Logits [s, V] of the last layer's hidden states, without padding rows."""
        head = _HEAD if _HEAD in self.checkpoint.tensors else _EMBEDDING
        return self._product(self._norm(x, "model.norm.weight"), head)

    def _attention(self, x: Tensor, prefix: str) -> Tensor:
        d = self.shape.head_dim
        q, k, v = (self._product(x, f"{prefix}{p}_proj.weight").unflatten(-1, (-1, d)).unsqueeze(1) for p in "qkv")
        angles = torch.outer(torch.arange(len(x), dtype=torch.float32), self.inv_freq)
        q, k = apply_rotary(q, k, angles.cos().to(self.device), angles.sin().to(self.device))
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        context = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self._product(context.permute(2, 0, 1, 3).flatten(1), prefix + "o_proj.weight")

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.checkpoint.tensors[name]
        return rms_norm(x, self._rows(weight, 0, weight.shape[0]).flatten(), self.epsilon)

    def _product(self, x: Tensor, name: str) -> Tensor:
        matrix = self.checkpoint.tensors[name]
        out = x.new_empty(len(x), matrix.shape[0])
        for start, stop in bands(matrix, self.band):
            torch.matmul(x, self._rows(matrix, start, stop).t(), out=out[:, start:stop])
        return out

    def _rows(self, tensor: Logical, start: int, stop: int) -> Tensor:
        cols = tensor.shape[1] if len(tensor.shape) > 1 else 1
        data = bytearray((stop - start) * cols * tensor.dtype.itemsize)
        read_band(self.pool, tensor, start, stop, memoryview(data))
        values = torch.frombuffer(data, dtype=getattr(torch, tensor.dtype.name)).view(stop - start, cols)
        return values.to(self.device, torch.float32)


@dataclass
class LayerReport:
    """How far apart the hidden states are after a layer ("embedding", "layer 0", ...)."""

    name: str
    max_abs: float
    relative: float  # norm of the difference over the norm


@dataclass
class ForwardReport:
    layers: list[LayerReport]
    kl: float  # KL(first || second) of the logits, mean over positions, in nats
    same_top: float  # fraction of positions where both rank the same token first
    first: str | None  # the first layer beyond the tolerance


@torch.no_grad()
def compare_forward(
    one: Checkpoint,
    two: Checkpoint,
    tokens: list[int],
    band: int,
    tolerance: float,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda layers: None,
) -> ForwardReport:
    """Run both checkpoints on the same tokens, layer by layer."""
    pool = FilePool(os.O_RDONLY)
    try:
        models = []
        for checkpoint in (one, two):
            settings = checkpoint.run_settings()
            if settings is None:
                raise ConvertError(
                    f"{checkpoint.root}: no file gives its epsilon and rotary settings; give --hf-source"
                )
            models.append(StreamedLlama(checkpoint, settings, pool, band, device))
        if one.shape.num_layers != two.shape.num_layers or one.shape.hidden_size != two.shape.hidden_size:
            raise ConvertError("the two checkpoints are models of different sizes and cannot be compared")
        vocabulary = min(one.shape.vocab_size, two.shape.vocab_size)
        if not tokens or min(tokens) < 0 or max(tokens) >= vocabulary:
            raise ConvertError(f"token ids must be between 0 and {vocabulary - 1}")
        ids = torch.tensor(tokens)
        reports: list[LayerReport] = []
        states = [model.embed(ids) for model in models]
        reports.append(_report("embedding", *states))
        for number in range(one.shape.num_layers):
            states = [model.layer(x, number) for model, x in zip(models, states, strict=True)]
            reports.append(_report(f"layer {number}", *states))
            progress(1)
        a, b = (model.logits(x)[:, :vocabulary] for model, x in zip(models, states, strict=True))
    finally:
        pool.close()
    kl = same = 0.0
    # A row at a time: several copies of all logits would take hundreds of MB.
    for row_a, row_b in zip(a, b, strict=True):
        log_a, log_b = row_a.log_softmax(-1), row_b.log_softmax(-1)
        kl += float((log_a.exp() * (log_a - log_b)).sum()) / len(a)
        same += float(row_a.argmax() == row_b.argmax()) / len(a)
    reports.append(_report("logits", a, b))
    first = next((r.name for r in reports if not r.relative <= tolerance), None)
    return ForwardReport(reports, kl, same, first)


def _report(name: str, a: Tensor, b: Tensor) -> LayerReport:
    largest, squares = 0.0, 0.0
    for row_a, row_b in zip(a, b, strict=True):
        gap = row_a - row_b
        largest = max(largest, float(gap.abs().max()))
        squares += float(gap.double().square().sum())
    return LayerReport(name, largest, math.sqrt(squares) / max(float(b.norm()), 1e-30))


def read_tokens(text: str) -> Iterator[int]:
    """Parse token ids separated by white space or commas, with or without brackets."""
    for word in text.replace("[", " ").replace("]", " ").replace(",", " ").split():
        try:
            yield int(word)
        except ValueError:
            raise ConvertError(f"--tokens: {word!r} is not a token id; expected numbers separated by spaces") from None


def default_tokens(vocabulary: int, count: int = 128) -> list[int]:
    """Pseudo-random token ids, the same on every machine."""
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(20)).tolist()
