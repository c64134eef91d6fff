"""The width of the gated MLP as GPT-NeoX computes it from `intermediate_size`, and the widths of published Llamas."""

from __future__ import annotations

from typing import NamedTuple


class GatedMatrices(NamedTuple):
    """Sizes that GPT-NeoX gives the two matrices of a gated MLP; a usable MLP has `rows == 2 * columns`."""

    rows: int  # of the first matrix: gate and up projection together
    columns: int  # of the second

    @property
    def fit(self) -> bool:
        return self.rows == 2 * self.columns


def gpt_neox_matrices(intermediate_size: int, multiple: int) -> GatedMatrices:
    """GPT-NeoX's rule: two thirds of `intermediate_size` are gate and up, and both matrices are rounded up
    separately."""
    gated = 2 * intermediate_size // 3
    return GatedMatrices(2 * multiple * -(-gated // (2 * multiple)), multiple * -(-(gated // 2) // multiple))


# (num_layers, hidden_size, num_attention_heads, num_kv_heads) -> the width in the Hugging Face config, and the model's
# name.
PUBLISHED: dict[tuple[int, int, int, int], tuple[int, str]] = {
    (16, 2048, 32, 8): (8192, "Llama-3.2-1B"),
    (28, 3072, 24, 8): (8192, "Llama-3.2-3B"),
    (32, 4096, 32, 8): (14336, "Llama-3-8B"),
    (32, 4096, 32, 32): (11008, "Llama-7B (1, 2 and Code Llama)"),
    (40, 5120, 40, 40): (13824, "Llama-13B (1, 2 and Code Llama)"),
    (48, 8192, 64, 8): (22016, "Code Llama 34B"),
    (60, 6656, 52, 52): (17920, "Llama-30B"),
    (80, 8192, 64, 64): (22016, "Llama-65B"),
    (80, 8192, 64, 8): (28672, "Llama-70B (2 and 3)"),
    (126, 16384, 128, 8): (53248, "Llama-3.1-405B"),
}
