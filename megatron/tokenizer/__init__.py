"""Tokenizers of four file formats with one small interface; `build_tokenizer` picks by GPT-NeoX's type names."""

from megatron.tokenizer.base import Tokenizer, TokenizerError
from megatron.tokenizer.build import TOKENIZER_TYPES, build_tokenizer, vocabulary_size

__all__ = ["TOKENIZER_TYPES", "Tokenizer", "TokenizerError", "build_tokenizer", "vocabulary_size"]
