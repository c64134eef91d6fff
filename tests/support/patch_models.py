"""Small models of image patches: a `Case` whose ends read patches, and samples with uneven masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.neox_arguments import NeoXArgs
from tests.support.models import Case

# Keys that do not apply to a model of images.
_OF_TEXT = ("vocab_size", "make_vocab_size_divisible_by", "no_weight_tying")


@dataclass(frozen=True)
class PatchCase(Case):
    """A patch has size x size x channels values; `seq` is the number of patches that the model reads."""

    size: int = 4
    channels: int = 3
    normalise: str = "patch"
    tokenizer: str = "mlp"
    positions: str = "none"
    delta: float = 1.0
    floating: bool = False  # the same values as float32 instead of uint8

    @property
    def keys(self) -> dict[str, Any]:
        """The key `patches`."""
        found: dict[str, Any] = {
            "size": self.size,
            "channels": self.channels,
            "normalise": self.normalise,
            "tokenizer": self.tokenizer,
            "positions": self.positions,
            "huber_delta": self.delta,
        }
        if self.normalise == "none":
            found |= {"mean": [100.0 + 10 * band for band in range(self.channels)], "std": [70.0]}
        return found

    def neox(self, **overrides: Any) -> NeoXArgs:
        text = dict.fromkeys(_OF_TEXT)
        return super().neox(**{**text, "modality": "patches", "patches": self.keys, **overrides})

    def hugging_face(self, seed: int = 0) -> Any:
        """A random `PatchLlama` (from examples/astropt, which loads exported models) in fp32 with uneven norms."""
        from examples.astropt.load_exported import PatchLlama

        config = super().hugging_face(seed).config
        torch.manual_seed(seed)
        defaults = {"mean": None, "std": None}
        model = PatchLlama(config, defaults | self.keys).float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.normal_(1.0, 0.2)
                else:
                    parameter.normal_(0.0, 0.05)
        return model.eval()

    def samples(self, count: int, seed: int = 7) -> list[dict[str, Tensor]]:
        """Samples of random bytes; the masked fraction of sample i's patches grows with i mod 4 (none to 90 %)."""
        generator = torch.Generator().manual_seed(seed)
        values = self.size**2 * self.channels
        found = []
        for index in range(count):
            patches = torch.randint(0, 256, (self.seq + 1, values), generator=generator, dtype=torch.uint8)
            mask = torch.rand(self.seq, generator=generator) >= (index % 4) * 0.3
            if self.floating:
                patches = patches.float()
            found.append({"patches": patches[:-1], "targets": patches[1:], "mask": mask})
        return found
