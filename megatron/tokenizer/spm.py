"""SentencePiece models (Llama 2, Mistral)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import sentencepiece

from megatron.tokenizer.base import Tokenizer, TokenizerError


class SPMTokenizer(Tokenizer):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise TokenizerError(
                f"{path}: not a SentencePiece model ({error}). For Llama 3 use TiktokenTokenizer or HFTokenizer"
            ) from error
        self.vocab_size = self._model.vocab_size()
        self.special_tokens = {
            self._model.id_to_piece(i): i for i in range(self.vocab_size) if self._model.is_control(i)
        }

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """SentencePiece drops control tokens; they are restored by name so that a decoded document shows its frame."""
        parts: list[str] = []
        run: list[int] = []
        for index in ids:
            if self._model.is_control(int(index)):
                parts += [self._model.decode(run), self._model.id_to_piece(int(index))]
                run = []
            else:
                run.append(int(index))
        return "".join([*parts, self._model.decode(run)])

    @cached_property
    def fingerprint(self) -> str:
        return "sha256:" + hashlib.sha256(self.path.read_bytes()).hexdigest()
