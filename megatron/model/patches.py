"""Input and output layers of a model of image patches (AstroPT, Smith et al. 2024), and its loss.

Shapes: s patches of P values (side x side x bands), b micro-batch, h hidden; t tensor-parallel ranks. Stages read raw
values, uint8 or float32, and scale them in fp32 on the device: a uint8 image takes a quarter of the memory on the way
there, and the embedding and the loss see the same numbers.

With sequence parallelism the embedding returns this rank's slice of the sequence, and the head and the loss work on a
slice. Gradients of replicated matrices then cover one slice, and are summed over the ranks like those of the norms.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor, nn

from megatron.layout.patches import AFFINE, MLP_FACTOR
from megatron.model.cache import CachedTokens
from megatron.model.parallel import TensorParallel
from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.keys.patches import PatchKeys

EPSILON = 1e-8  # added to the standard deviation of a patch, as in AstroPT


@dataclass(frozen=True)
class PatchScale:
    """Scales raw patch values to what the model reads and predicts, in fp32.

    Each patch is standardized by its own mean and (unbiased) standard deviation, or each band by those of the data set.
    """

    patches: PatchKeys
    _on_device: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, raw: Tensor) -> Tensor:
        """[..., P] of any type -> fp32 [..., P], without a gradient."""
        values = raw.detach().float()
        if self.patches.normalise == "patch":
            std, mean = torch.std_mean(values, dim=-1, keepdim=True)
            return (values - mean) / (std + EPSILON)
        mean, std = self._of_bands(raw.device)
        return (values - mean) / std

    def raw(self, scaled: Tensor) -> Tensor:
        """Scaled values back to raw ones, in fp32. ValueError if each patch was standardized by its own statistics."""
        if self.patches.normalise == "patch":
            raise ValueError("a standardized patch does not know its mean and standard deviation")
        mean, std = self._of_bands(scaled.device)
        return scaled.float() * std + mean

    def _of_bands(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(mean, std) [P] of each value's band."""
        if device not in self._on_device:
            keys = self.patches
            assert keys.mean is not None  # guaranteed by the rule images_have_a_scale
            assert keys.std is not None
            pixels, bands = keys.size**2, keys.channels
            mean, std = (
                torch.tensor(numbers if len(numbers) == bands else numbers * bands, dtype=torch.float32).repeat(pixels)
                for numbers in (keys.mean, keys.std)
            )
            self._on_device[device] = (mean.to(device), std.to(device))
        return self._on_device[device]


class PlainLinear(nn.Module):
    """A matrix [out, in] without communication: replicated, or split by rows where the input is replicated and takes no
    gradient. Not initialized."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class PatchPositions(nn.Module):
    """A learned vector for each position, added to the hidden states."""

    def __init__(self, positions: int, features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(positions, features, dtype=dtype))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + F.embedding(positions, self.weight)


class PatchEmbedding(nn.Module):
    """Raw patches [b, s, P] -> hidden states [b, s, h], or this rank's slice [b, s/t, h] of them."""

    def __init__(self, args: NeoXArgs, tp: TensorParallel) -> None:
        super().__init__()
        shape, keys = args.shape, args.patches
        assert keys is not None
        self.scale, self.dtype, self.tp = PatchScale(keys), tp.dtype, tp
        values, h = keys.channels * keys.size**2, shape.hidden_size
        self.affine = keys.tokenizer == AFFINE
        if self.affine:
            self.project = PlainLinear(values, h, tp.dtype)
        else:
            self.linear1 = PlainLinear(values, MLP_FACTOR * h // tp.size, tp.dtype)
            self.linear2 = tp.row(MLP_FACTOR * h, h, sequence_dim=1)
        learned = keys.positions == "learned"
        self.position_embeddings = PatchPositions(args.max_position_embeddings, h, tp.dtype) if learned else None

    def forward(self, stream: Tensor | tuple[Tensor, CachedTokens]) -> Tensor | tuple[Tensor, CachedTokens]:
        raw, cached = stream if isinstance(stream, tuple) else (stream, None)
        x = self.scale(raw).to(self.dtype)
        positions = torch.arange(raw.shape[1], device=raw.device)[None] if cached is None else cached.positions
        y = self.project(self.tp.own_slice(x, 1)) if self.affine else self.linear2(F.gelu(self.linear1(x)))
        if self.position_embeddings is not None:
            y = self.position_embeddings(y, self.tp.own_slice(positions, 1))
        return y if cached is None else (y, cached)


class PatchHead(nn.Module):
    """Hidden states [b, s, h] -> predicted next patches [b, s, P], scaled; slices of the sequence stay slices."""

    def __init__(self, args: NeoXArgs, tp: TensorParallel) -> None:
        super().__init__()
        keys, h = args.patches, args.hidden_size
        assert keys is not None
        values = keys.channels * keys.size**2
        self.affine = keys.tokenizer == AFFINE
        if self.affine:
            self.project = PlainLinear(h, values, tp.dtype)
        else:
            self.linear1 = tp.column(h, MLP_FACTOR * h, sequence_dim=1)
            self.linear2 = tp.row(MLP_FACTOR * h, values, sequence_dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x) if self.affine else self.linear2(F.gelu(self.linear1(x)))


@dataclass(frozen=True)
class GlobalMeanHuber:
    """Huber loss (Huber 1964) of one micro-batch, scaled so that the engine's mean is the mean over the global batch.

    `targets` are (raw patches [b, s, P], mask [b, s], weight []): the mean over the values of each patch, summed over
    the learned patches and multiplied by the weight of `megatron.model.loss.step_weight`.
    """

    tp: TensorParallel
    scale: PatchScale

    def __call__(self, prediction: Tensor, targets: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        raw, mask, weight = targets
        losses = self.patch_losses(prediction, self.tp.own_slice(raw, 1)) * self.tp.own_slice(mask, 1)
        total = losses.sum() * weight
        return reduce_from_tensor_model_parallel_region(total, self.tp.group) if self.tp.sequence_parallel else total

    def patch_losses(self, prediction: Tensor, raw: Tensor) -> Tensor:
        """fp32 loss of each patch [b, s]."""
        return _huber(prediction.float(), self.scale(raw), self.scale.patches.huber_delta)


def zero_loss(scale: PatchScale, raw: Tensor) -> Tensor:
    """fp32 loss of each patch [..., P] for a model that always predicts the mean, 0 after scaling."""
    scaled = scale(raw)
    return _huber(torch.zeros_like(scaled), scaled, scale.patches.huber_delta)


def _huber(prediction: Tensor, target: Tensor, delta: float) -> Tensor:
    return F.huber_loss(prediction, target, reduction="none", delta=delta).mean(-1)
