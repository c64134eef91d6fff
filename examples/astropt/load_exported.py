"""A model of image patches as `convert_hf to-hf` writes it, loaded with transformers and torch alone."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel


class PatchLlama(nn.Module):
    """Raw patches [b, s, size * size * channels] in the order of `patches` -> the next patches, scaled."""

    def __init__(self, config: LlamaConfig, patches: dict) -> None:
        super().__init__()
        self.settings, h, values = patches, config.hidden_size, patches["size"] ** 2 * patches["channels"]
        self.model = LlamaModel(config)
        self.model.embed_tokens = nn.Identity()  # there is no vocabulary
        ends = {"embed": (values, h), "head": (h, values)}
        self.patches = nn.ModuleDict({name: nn.ModuleDict(self._matrices(*sizes, h)) for name, sizes in ends.items()})
        if patches["positions"] == "learned":
            positions = nn.Embedding(config.max_position_embeddings, h)
            self.patches["embed"]["position_embeddings"] = positions

    def _matrices(self, inputs: int, outputs: int, h: int) -> dict[str, nn.Module]:
        if self.settings["tokenizer"] == "affine":
            return {"project": nn.Linear(inputs, outputs, bias=False)}
        return {"linear1": nn.Linear(inputs, 4 * h, bias=False), "linear2": nn.Linear(4 * h, outputs, bias=False)}

    def scale(self, raw: Tensor) -> Tensor:
        x = raw.float()
        if self.settings["normalise"] == "patch":
            return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-8)
        mean, std = (torch.tensor(self.settings[name]) for name in ("mean", "std"))
        bands = x.unflatten(-1, (-1, self.settings["channels"]))
        return ((bands - mean) / std).flatten(-2)

    def end(self, name: str, x: Tensor) -> Tensor:
        part = self.patches[name]
        return part["project"](x) if "project" in part else part["linear2"](nn.functional.gelu(part["linear1"](x)))

    def hidden_states(self, raw: Tensor) -> tuple[Tensor, ...]:
        """[b, s, h]: what enters the first layer, what leaves each but the last, and the last one's after the norm."""
        x = self.end("embed", self.scale(raw).to(self.model.dtype))
        if "position_embeddings" in self.patches["embed"]:
            x = x + self.patches["embed"]["position_embeddings"].weight[: raw.shape[1]]
        return self.model(inputs_embeds=x, output_hidden_states=True).hidden_states

    def forward(self, raw: Tensor) -> Tensor:
        return self.end("head", self.hidden_states(raw)[-1])


def load_exported(folder: Path) -> PatchLlama:
    model = PatchLlama(LlamaConfig.from_pretrained(folder), json.loads((folder / "patches.json").read_text()))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()
