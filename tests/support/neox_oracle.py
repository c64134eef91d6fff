"""The published GPT-NeoX layout, reimplemented with plain torch slicing.

It must not import the project's layout table or any part of the converter, which are checked against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

LayerFiles = dict[str, dict[str, Tensor]]  # file name -> tensors


def pad_rows(matrix: Tensor, multiple: int) -> Tensor:
    missing = -matrix.shape[0] % multiple
    return torch.cat([matrix, matrix.new_zeros(missing, matrix.shape[1])]) if missing else matrix


def neox_files(state: dict[str, Tensor], heads: int, kv_heads: int, tp: int, vocab_multiple: int) -> LayerFiles:
    """Layer files of a Hugging Face Llama state dict for `tp` ranks; `vocab_multiple` is per rank."""
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("model.layers."))
    files: LayerFiles = {}

    def put(index: int, rank: int, **tensors: Tensor) -> None:
        name = f"layer_{index:02d}-model_{rank:02d}-model_states.pt"
        files[name] = {key.replace("__", "."): value.contiguous() for key, value in tensors.items()}

    embedding = pad_rows(state["model.embed_tokens.weight"], vocab_multiple * tp)
    for rank in range(tp):
        put(0, rank, word_embeddings__weight=embedding.chunk(tp)[rank])
        for i in range(layers):
            get = {n: state[f"model.layers.{i}.{n}.weight"] for n in _NAMES}
            q, k, v = (get[f"self_attn.{p}_proj"] for p in "qkv")
            if heads == kv_heads:
                rows = len(q) // heads
                by_head = torch.stack([m.view(heads, rows, -1) for m in (q, k, v)], dim=1)  # [heads, 3, d, h]
                mixed = by_head.chunk(tp)[rank].flatten(0, 2)
            else:
                mixed = torch.cat([m.chunk(tp)[rank] for m in (q, k, v)])
            put(
                i + 2,
                rank,
                input_layernorm__scale=get["input_layernorm"],
                attention__query_key_value__weight=mixed,
                attention__dense__weight=get["self_attn.o_proj"].chunk(tp, dim=1)[rank],
                post_attention_layernorm__scale=get["post_attention_layernorm"],
                mlp__linear1__weight=torch.cat(
                    [get["mlp.up_proj"].chunk(tp)[rank], get["mlp.gate_proj"].chunk(tp)[rank]]
                ),
                mlp__linear2__weight=get["mlp.down_proj"].chunk(tp, dim=1)[rank],
            )
        put(layers + 3, rank, norm__scale=state["model.norm.weight"])
        if "lm_head.weight" in state:
            head = pad_rows(state["lm_head.weight"], vocab_multiple * tp)
            put(layers + 4, rank, final_linear__weight=head.chunk(tp)[rank])
    return files


_NAMES = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.up_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
)
