"""Perplexity of a text under a language model: a KenLM n-gram, or a causal model in a Hugging Face folder.

Perplexity is exp(-log probability / units). For KenLM, units are words, and the end of a line counts as one (its own
convention, and CCNet's); for a Hugging Face model they are UTF-8 bytes (2 to the power of The Pile's bits per byte).
Perplexity per token would be misleading there: random letters are split into single letters, each of them easy to
guess.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

from megatron.data.indexed import DataError

NGRAM_SUFFIXES = (".arpa", ".arpa.gz", ".bin", ".binary", ".klm")
WINDOW = 2048  # tokens a Hugging Face model sees at once, if its own context is not shorter


class Perplexity(Protocol):
    """Created in the parent process; large data are loaded at the first use, in each worker."""

    name: str

    def __call__(self, text: str) -> float: ...


def load_perplexity(path: Path) -> Perplexity:
    """Choose the model by the kind of path. Raises DataError."""
    if path.is_file() and path.name.endswith(NGRAM_SUFFIXES):
        return Ngram(path)
    if (path / "config.json").is_file():
        return HuggingFace(path)
    if (path / "latest").is_file():
        raise DataError(
            f"--perplexity-model {path}: this is a NeoX checkpoint; convert it first: "
            f"python tools/convert_hf to-hf --input {path} --output FOLDER"
        )
    raise DataError(
        f"--perplexity-model {path}: expected a KenLM file ({', '.join(NGRAM_SUFFIXES)}) or a Hugging Face model folder"
    )


def word_lines(text: str) -> list[str]:
    """Lines of lower-case words separated by single spaces: the form of a text for n-grams."""
    lines = [" ".join(line.lower().split()) for line in text.splitlines()]
    return [line for line in lines if line]


class Ngram:
    """KenLM; the file is memory-mapped and shared by all workers."""

    def __init__(self, path: Path) -> None:
        try:
            import kenlm
        except ImportError as error:
            raise DataError(f"{path}: n-grams need the package kenlm (pip install .[data])") from error
        try:
            config = kenlm.Config()
            config.show_progress, config.arpa_complain = False, kenlm.ARPALoadComplain.NONE
            self._model = kenlm.Model(str(path), config)
        except OSError as error:
            raise DataError(f"{path}: not a KenLM model: {error}") from None
        self.name = str(path)

    def __call__(self, text: str) -> float:
        lines = word_lines(text)
        units = sum(line.count(" ") + 2 for line in lines)
        score = sum(self._model.score(line) for line in lines)  # log10
        return float(10 ** min(300.0, -score / max(1, units)))


class HuggingFace:
    """A causal language model through `transformers`; each worker has its own copy, on a GPU if available."""

    def __init__(self, path: Path) -> None:
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise DataError(f"{path}: a Hugging Face model needs the package transformers") from error
        self._path = path
        self._loaded: tuple[Any, Any] | None = None
        self.name = str(path)

    def __call__(self, text: str) -> float:
        import torch

        model, tokenizer = self._loaded or self._load()
        window = min(WINDOW, model.config.max_position_embeddings)
        ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
        begin = torch.tensor([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id], dtype=ids.dtype)
        total = 0.0
        for piece in ids.split(window - len(begin)):
            piece = torch.cat([begin, piece])
            if len(piece) < 2:
                continue
            with torch.inference_mode():
                logits = model(piece[None].to(model.device)).logits[0, :-1].float()
                total += torch.nn.functional.cross_entropy(logits, piece[1:].to(logits.device), reduction="sum").item()
        return math.exp(min(700.0, total / max(1, len(text.encode(errors="replace")))))

    def _load(self) -> tuple[Any, Any]:
        import multiprocessing

        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)  # the workers are the parallelism
        place = "cpu"
        if torch.cuda.is_available():
            number = (multiprocessing.current_process()._identity or (1,))[0]
            place = f"cuda:{(number - 1) % torch.cuda.device_count()}"
        model = AutoModelForCausalLM.from_pretrained(self._path, dtype=torch.bfloat16 if place != "cpu" else None)
        self._loaded = (model.eval().to(place), AutoTokenizer.from_pretrained(self._path))
        return self._loaded
