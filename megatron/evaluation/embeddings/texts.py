"""Reads the texts of a file as token ids; unusable records are named and counted, never dropped silently."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.evaluation.embeddings.records import read_records
from megatron.evaluation.prompts import PromptEncoder
from megatron.neox_arguments.keys.embeddings import EmbedKeys


@dataclass(frozen=True)
class EncodedInput:
    """An id and the model's input: tokens with the begin-of-text token, or patches; `cut` if it was truncated."""

    id: str | int
    values: np.ndarray
    cut: bool = False


@dataclass(frozen=True)
class BadText:
    """A record without a usable text: `message` has location and problem, `rule` is a short name for counting."""

    message: str
    rule: str


class TextReader:
    """Reads the file that `embed.input` names."""

    def __init__(self, keys: EmbedKeys, encoder: PromptEncoder, longest: int) -> None:
        assert keys.input is not None  # checked with the configuration
        self.path, self._keys, self._encoder, self._longest = Path(keys.input), keys, encoder, longest

    def read(self, start: int) -> Iterator[EncodedInput | BadText]:
        """One item per record from number `start` on, in file order. Raises TextError if the file cannot be read."""
        for number, (where, record) in enumerate(read_records(self.path, self._columns)):
            if number >= start:
                yield self._encode(number, where, record)

    @property
    def _columns(self) -> list[str]:
        return [name for name in (self._keys.text_field, self._keys.id_field) if name is not None]

    def _encode(self, number: int, where: str, record: Any) -> EncodedInput | BadText:
        name = self._keys.text_field
        if isinstance(record, bytes):
            try:
                record = json.loads(record)
            except (ValueError, RecursionError) as error:
                return BadText(f"{where}: not JSON ({error})", "not JSON")
        if not isinstance(record, dict) or name not in record:
            found = ", ".join(map(str, record)) if isinstance(record, dict) else f"a {type(record).__name__}"
            return BadText(f"{where}: expected a record with {name}, found {found or 'an empty one'}", f"no {name}")
        text = record[name]
        if not isinstance(text, str):
            return BadText(f"{where}: {name} is of type {type(text).__name__}, expected a text", f"{name} is not text")
        if not text.strip():
            return BadText(f"{where}: {name} is empty", f"empty {name}")
        identity = number if self._keys.id_field is None else record.get(self._keys.id_field, number)
        if isinstance(identity, bool) or not isinstance(identity, str | int):
            kind = type(identity).__name__
            return BadText(f"{where}: {self._keys.id_field} is of type {kind}, expected a text or a number", "bad id")
        ids = self._encoder.text(text)
        cut = len(ids) > self._longest
        if cut and not self._keys.cut_long_texts:
            return BadText(
                f"{where}: {len(ids)} tokens, seq_length allows {self._longest}; embed.cut_long_texts: true reads the "
                f"first ones",
                "too long",
            )
        return EncodedInput(identity, np.array(ids[: self._longest], dtype=np.int64), cut)
