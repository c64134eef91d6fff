"""The tokenizer interface: text to ids and back, and the ids that frame a document.

Two rules hold for every format. Text is text: a special token's name inside a document is encoded as ordinary
characters and never becomes the token (a corpus that quotes `<|end_of_text|>` must not end a document). Nothing is
added: no BOS or EOS unless the caller adds its id.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.common.errors import UserError

BOS_NAMES = ("<|begin_of_text|>", "<s>")
EOD_NAMES = ("<|end_of_text|>", "<|endoftext|>", "</s>")
END_OF_TURN_NAMES = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>")
PAD_NAMES = ("<|finetune_right_pad_id|>", "<|padding|>", "<pad>")


class TokenizerError(UserError, ValueError):
    """A tokenizer file that cannot be used, or a token it lacks; the message says which and what to do."""


class Tokenizer(ABC):
    """A loaded vocabulary.

    Subclasses set `special_tokens` (name -> id) and `vocab_size` (highest id + 1) and implement the three codecs.
    """

    special_tokens: dict[str, int]
    vocab_size: int

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens appear by name, invalid UTF-8 as U+FFFD."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of everything that determines the ids of a text. It is stored with the data; training compares it with
        its own."""

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def _encode_arrays(self, texts: list[str]) -> list[NDArray[np.integer]]:
        return [np.array(ids, np.uint32) for ids in self._encode_batch(texts)]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS or EOS. Lone surrogates (broken JSON escapes) are read as U+FFFD."""
        return self._encode(_valid_unicode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`[encode(text) for text in texts]`, on several threads where the library can."""
        return self._encode_batch([_valid_unicode(text) for text in texts])

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """`encode_batch` as numpy arrays, which avoids creating a Python object per token."""
        return self._encode_arrays([_valid_unicode(text) for text in texts])

    def token_id(self, name: str) -> int:
        """Id of a special token by name. Raises TokenizerError if the vocabulary lacks it."""
        try:
            return self.special_tokens[name]
        except KeyError:
            raise TokenizerError(f"{self.path}: the tokenizer has no special token {name}") from None

    @cached_property
    def bos(self) -> int | None:
        """Begin-of-document id, None where the vocabulary has none (GPT-NeoX-20B)."""
        return self._first(BOS_NAMES)

    @cached_property
    def eod(self) -> int:
        """End-of-document id. Raises TokenizerError if none of the known names is in the vocabulary."""
        found = self._first(EOD_NAMES)
        if found is None:
            raise TokenizerError(
                f"{self.path}: no end-of-document token; expected one of {', '.join(EOD_NAMES)} among the special "
                f"tokens, found {', '.join(sorted(self.special_tokens)[:8]) or 'none'}. "
                f"Add one of these names to the tokenizer file"
            )
        return found

    @cached_property
    def ends(self) -> frozenset[int]:
        """Ids at which generated text ends: end-of-document, and what ends a turn of a conversation."""
        names = (name for name in END_OF_TURN_NAMES if name in self.special_tokens)
        return frozenset({self.eod, *(self.special_tokens[name] for name in names)})

    @cached_property
    def pad(self) -> int:
        """Id that fills unused positions; the end-of-document id where the vocabulary has no padding token."""
        found = self._first(PAD_NAMES)
        return self.eod if found is None else found

    def _first(self, names: Sequence[str]) -> int | None:
        return next((self.special_tokens[name] for name in names if name in self.special_tokens), None)


def _valid_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
