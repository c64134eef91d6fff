"""The key-value cache of generation: each forward pass runs only the new tokens.

A cache belongs to a group of sequences, one per slot; column p of a slot is position p of its sequence. `CachedTokens`
describes the tokens of one forward pass and travels through the layers with the hidden states, as `Documents` does.
Rows may differ in length: whatever is written past the end of a row is overwritten before any token attends to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops import apply_rotary

GROWTH = 256  # columns by which a cache grows


class KeyValueCache:
    """Keys and values [slots, m, columns, d] of each layer on this rank, for at most `max_length` positions."""

    def __init__(self, slots: int, max_length: int) -> None:
        self.slots, self.max_length = slots, max_length
        self._columns = 0
        self._held: dict[object, tuple[Tensor, Tensor]] = {}

    def reserve(self, length: int) -> None:
        """Grow to at least `length` positions. ValueError if `length` exceeds `max_length`."""
        if length > self.max_length:
            raise ValueError(f"{length} positions for a cache of at most {self.max_length}")
        if length <= self._columns:
            return
        columns = max(length, min(self.max_length, -(-length // GROWTH) * GROWTH))
        more = columns - self._columns
        self._columns = columns
        for layer, (keys, values) in self._held.items():
            self._held[layer] = (F.pad(keys, (0, 0, 0, more)), F.pad(values, (0, 0, 0, more)))

    def of(self, layer: object, like: Tensor) -> tuple[Tensor, Tensor]:
        """(keys, values) of a layer, allocated at first use with the heads, dtype and device of `like` [s, b, m, d]."""
        if layer not in self._held:
            shape = (self.slots, like.shape[2], self._columns, like.shape[3])
            self._held[layer] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._held[layer]

    def move(self, source: int, target: int) -> None:
        """Copy the slot `source` over the slot `target`."""
        for keys, values in self._held.values():
            keys[target] = keys[source]
            values[target] = values[source]

    @property
    def bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self._held.values())


class CachedTokens:
    """The tokens [b, s] of one forward pass, which continue the sequences in slots `first` to `first + b`, exclusive.

    `starts` are the positions of the rows' first tokens; with several tokens per row, all rows must start at the same
    position. Logits are computed only at `outputs`, (row, token) pairs.
    """

    def __init__(
        self,
        cache: KeyValueCache,
        first: int,
        starts: list[int],
        s: int,
        outputs: list[tuple[int, int]],
        device: torch.device,
    ) -> None:
        if s > 1 and len(set(starts)) > 1:
            raise ValueError(f"rows of {s} tokens start at different positions: {starts}")
        self.cache, self.first, self.s = cache, first, s
        self.rows, self.start, self.end = len(starts), starts[0], max(starts) + s
        self.outputs = outputs
        self.positions = torch.tensor(starts, device=device)[:, None] + torch.arange(s, device=device)
        self._mask = self._visible(device, ragged=len(set(starts)) > 1)
        self._row_numbers = torch.arange(self.rows, device=device)
        self._angles: tuple[Tensor, Tensor] | None = None  # (cos, sin) of the positions, shared by all layers
        cache.reserve(self.end)

    def _visible(self, device: torch.device, ragged: bool) -> Tensor | None:
        """The attention mask, broadcastable to [b, heads, s, columns]; None where none is needed."""
        if self.s == 1:
            columns = torch.arange(self.end, device=device)
            return (columns <= self.positions)[:, None, None] if ragged else None
        return self.positions[0, :, None] >= torch.arange(self.end, device=device) if self.start else None

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate q [s, b, n, d] and k [s, b, m, d] by their positions; `cos` and `sin` cover all positions."""
        if self.s > 1:
            return apply_rotary(q, k, cos, sin, self.positions)
        if self._angles is None:
            self._angles = (cos[self.positions[:, 0]], sin[self.positions[:, 0]])
        # Rows take the place of the sequence, so that the angles are looked up once for all layers.
        q, k = apply_rotary(q.transpose(0, 1), k.transpose(0, 1), *self._angles)
        return q.transpose(0, 1), k.transpose(0, 1)

    def attend(self, layer: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append k and v to the cache and attend to everything in each token's sequence, the token itself included.

        q [s, b, n, d], k and v [s, b, m, d], already rotated; returns [s, b, n, d].
        """
        keys, values = self._append(layer, k, v)
        s, b, n, d = q.shape
        if s == 1:
            # The query heads that share a key head take the place of the sequence: keys and values are not repeated.
            grouped = q.view(b, k.shape[2], n // k.shape[2], d)
            return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self._mask).reshape(1, b, n, d)
        context = F.scaled_dot_product_attention(
            q.permute(1, 2, 0, 3),
            keys,
            values,
            attn_mask=self._mask,
            is_causal=self._mask is None,
            enable_gqa=n != k.shape[2],
        )
        return context.permute(2, 0, 1, 3)

    def _append(self, layer: object, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v to the cache; returns views of the slots' keys and values up to the last token."""
        stop = self.first + self.rows
        views = []
        for held, new in zip(self.cache.of(layer, k), (k, v), strict=True):
            rows = held[self.first : stop]
            if self._mask is None or self.s > 1:
                rows[:, :, self.start : self.end] = new.permute(1, 2, 0, 3)
            else:
                rows[self._row_numbers, :, self.positions[:, 0]] = new[0]
            views.append(rows[:, :, : self.end])
        return views[0], views[1]

    def at_outputs(self, hidden: Tensor) -> Tensor:
        """[s, b, h] -> [n, 1, h], the n tokens whose logits are wanted."""
        rows = torch.tensor([row for row, _ in self.outputs], device=hidden.device, dtype=torch.int64)
        tokens = torch.tensor([token for _, token in self.outputs], device=hidden.device, dtype=torch.int64)
        return hidden[tokens, rows].unsqueeze(1)


def input_shape(first_layer: int, num_layers: int, hidden_size: int, tokens: CachedTokens) -> tuple[int, ...]:
    """Shape of the hidden states entering a stage that starts at layer `first_layer` (not 0) of the checkpoint."""
    if first_layer == 1:
        return (tokens.rows, tokens.s, hidden_size)
    if first_layer <= num_layers + 2:
        return (tokens.s, tokens.rows, hidden_size)
    return (len(tokens.outputs), 1, hidden_size)


def run_cached(
    layers: Iterable[Callable[[Any], Any]], first_layer: int, num_layers: int, inputs: Tensor, tokens: CachedTokens
) -> Tensor:
    """Run a stage's layers in order on ids [b, s] or hidden states; the last stage gives logits [n, 1, V / tp]."""
    stream: Any = (inputs, tokens) if first_layer <= num_layers + 2 else inputs
    for layer in layers:
        if isinstance(stream, Tensor) and stream.numel() == 0:
            break  # no logits are wanted for these tokens
        stream = layer(stream)
    result: Tensor = stream[0] if isinstance(stream, tuple) else stream
    return result
