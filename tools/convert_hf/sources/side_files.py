"""The small files of a model folder that are copied with the weights unchanged: configuration, tokenizer, license."""

from __future__ import annotations

import re
from pathlib import Path

from megatron.checkpoint.manifest import MANIFEST_NAME

from ..errors import ConvertError
from .hf import SAFETENSORS_INDEX

_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".partial")
_NOT = {MANIFEST_NAME, "pytorch_model.bin.index.json", "params.json", "checklist.chk", "latest", "model.yml"}
_CHAT_TEMPLATES = "additional_chat_templates"  # the only subfolder with text files that transformers writes
MAX_BYTES = 128_000_000


def side_files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The files to copy, by relative name, and the names of those left behind."""
    found: dict[str, Path] = {}
    left = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if path.name == _CHAT_TEMPLATES:
                found |= {f"{path.name}/{p.name}": p for p in sorted(path.iterdir()) if p.is_file()}
            else:
                left.append(path.name + "/")
        elif not path.is_file():  # a broken or circular link, a socket
            raise ConvertError(f"{path} is neither a file nor a folder (a broken link?); repair or remove it")
        elif path.suffix in _WEIGHTS or path.name in _NOT or path.stat().st_size > MAX_BYTES:
            left.append(path.name)
        else:
            found[path.name] = path
    return found, left


def tokenizer_of(files: dict[str, Path]) -> tuple[str, str] | None:
    """(tokenizer_type, file name) for the training configuration, or None without a tokenizer."""
    if "tokenizer.json" in files:
        return "HFTokenizer", "tokenizer.json"
    if "tokenizer.model" in files:
        with open(files["tokenizer.model"], "rb") as file:
            first = file.readline(200)
        # Meta's Llama-3 vocabulary is text, with a base64 token and its rank per line; SentencePiece's is binary.
        tiktoken = re.fullmatch(rb"[A-Za-z0-9+/=]+ \d+\r?\n", first) is not None
        return ("TiktokenTokenizer" if tiktoken else "SPMTokenizer"), "tokenizer.model"
    return None


def shard_index(files: dict[str, Path]) -> Path | None:
    return files.get(SAFETENSORS_INDEX)
