"""Loads an image model exported by `convert_hf to-hf`, with transformers and torch alone."""

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
        self.settings, self.model, h = patches, LlamaModel(config), config.hidden_size
        self.model.embed_tokens = nn.Identity()  # there is no vocabulary
        self.patches, values = nn.ModuleDict(), patches["size"] ** 2 * patches["channels"]
        for end, widths in {"embed": (values, 4 * h, h), "head": (h, 4 * h, values)}.items():
            names = {"linear1": widths[:2], "linear2": widths[1:]}
            if patches["tokenizer"] == "affine":
                names = {"project": widths[::2]}
            self.patches[end] = nn.ModuleDict({name: nn.Linear(*sizes, bias=False) for name, sizes in names.items()})
        if patches["positions"] == "learned":
            self.patches["embed"]["position_embeddings"] = nn.Embedding(config.max_position_embeddings, h)

    def scale(self, raw: Tensor) -> Tensor:
        x = raw.float().unflatten(-1, (-1, self.settings["channels"]))
        if self.settings["normalise"] == "patch":
            return ((x - x.mean((-2, -1), keepdim=True)) / (x.std((-2, -1), keepdim=True) + 1e-8)).flatten(-2)
        return ((x - torch.tensor(self.settings["mean"])) / torch.tensor(self.settings["std"])).flatten(-2)

    def end(self, name: str, x: Tensor) -> Tensor:
        part = self.patches[name]
        return part["project"](x) if "project" in part else part["linear2"](nn.functional.gelu(part["linear1"](x)))

    def hidden_states(self, raw: Tensor) -> tuple[Tensor, ...]:
        """[b, s, h]: the first layer's input, then every layer's output, the last one after the final norm."""
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
