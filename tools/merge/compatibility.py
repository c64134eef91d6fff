"""Check that parents can be merged, from their headers and small files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..convert_hf.sources.checkpoint import check_duplicates
from ..convert_hf.sources.side_files import side_files
from .errors import MergeError
from .parents import Parent

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def check_parents(parents: Mapping[str, Parent]) -> list[str]:
    """Return remarks on the parents; MergeError if a sum of their weights would be meaningless."""
    first, *others = parents.values()
    remarks: list[str] = []
    for parent in parents.values():
        _check_own_settings(parent)
    for other in others:
        _check_shapes(first, other)
        _check_tensors(first, other)
        _check_settings(first, other)
        remarks += _check_tokenizers(first, other)
        remarks += _context_remarks(first, other)
    return remarks


def check_replicas(parents: Mapping[str, Parent]) -> None:
    """Check that the copies of tensors that a NeoX checkpoint stores once per rank are equal, which reads them."""
    for checkpoint in {id(p.checkpoint): p.checkpoint for p in parents.values()}.values():
        check_duplicates(checkpoint)


def _check_shapes(one: Parent, two: Parent) -> None:
    a, b = one.checkpoint.shape, two.checkpoint.shape
    for name in ("num_layers", "hidden_size", "num_attention_heads", "num_kv_heads", "intermediate_size", "tied"):
        if getattr(a, name) != getattr(b, name):
            raise MergeError(
                f"{name} is {getattr(a, name)} in {one.label} and {getattr(b, name)} in {two.label}; "
                f"only models of the same shape can be merged"
            )
    if a.vocab_size != b.vocab_size:
        unknown = [p.label for p in (one, two) if p.checkpoint.config is None]
        hint = f"; {', '.join(unknown)} has no config.json, add `hf_source: DIR` to its entry" if unknown else ""
        raise MergeError(
            f"the vocabulary has {a.vocab_size} tokens in {one.label} and {b.vocab_size} in {two.label}: rows of one "
            f"would be added to rows of other tokens{hint}"
        )


def _check_tensors(one: Parent, two: Parent) -> None:
    a, b = one.checkpoint.tensors, two.checkpoint.tensors
    for name in sorted(set(a) ^ set(b)):
        raise MergeError(f"only {(one if name in a else two).label} has a tensor {name}")
    for name, tensor in a.items():
        if tensor.shape != b[name].shape:
            raise MergeError(f"{name} is {list(tensor.shape)} in {one.label} and {list(b[name].shape)} in {two.label}")


def _check_own_settings(parent: Parent) -> None:
    """Check that a NeoX checkpoint's training settings are known and agree with its config.json."""
    trained, written = parent.checkpoint.run_settings(), parent.checkpoint.config_settings()
    if trained is None:
        raise MergeError(
            f"{parent.label}: no file at {parent.checkpoint.root} gives its epsilon and rotary settings; "
            f"add `hf_source: DIR`, the folder it came from, to its entry"
        )
    if written is None:
        return
    for key, ours, theirs in trained.differences(written):
        raise MergeError(
            f"{parent.label}: {key} is {json.dumps(ours)} in {trained.origin}, but {json.dumps(theirs)} in "
            f"{written.origin}; correct whichever is wrong"
        )


def _check_settings(one: Parent, two: Parent) -> None:
    a, b = one.checkpoint.run_settings(), two.checkpoint.run_settings()
    assert a is not None
    assert b is not None
    for key, ours, theirs in a.differences(b):
        raise MergeError(
            f"{key} is {json.dumps(ours)} in {one.label} and {json.dumps(theirs)} in {two.label}; "
            f"the weights of one do not work with the other's"
        )


def _context_remarks(one: Parent, two: Parent) -> list[str]:
    a, b = one.checkpoint.config, two.checkpoint.config
    if a is None or b is None or a.max_position_embeddings == b.max_position_embeddings:
        return []
    return [
        f"max_position_embeddings is {a.max_position_embeddings} in {one.label} and {b.max_position_embeddings} in "
        f"{two.label}"
    ]


def _tokenizer_files(parent: Parent) -> dict[str, Path]:
    folder = parent.checkpoint.side_folder
    found = side_files(folder)[0] if folder is not None else {}
    return {name: found[name] for name in _TOKENIZERS if name in found}


def _check_tokenizers(one: Parent, two: Parent) -> list[str]:
    a, b = _tokenizer_files(one), _tokenizer_files(two)
    common = [name for name in _TOKENIZERS if name in a and name in b]
    if not common:
        missing = [p.label for p, files in ((one, a), (two, b)) if not files]
        return [f"no tokenizer with {', '.join(missing) or two.label}: not compared with that of {one.label}"]
    for name in common:
        if _digest(a[name]) == _digest(b[name]):
            return []
    name = common[0]
    if name == "tokenizer.json":
        difference = _token_difference(_tokenizer(a[name]), _tokenizer(b[name]))
        if difference is None:
            return []
    else:
        difference = "the files differ"
    raise MergeError(
        f"{one.label} and {two.label} have different tokenizers ({name}): {difference}. Their embeddings do not "
        f"represent the same tokens"
    )


@cache
def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tokenizer(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MergeError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("model"), dict):
        raise MergeError(f"{path} is not a tokenizer: it has no `model`")
    return value


def _token_difference(one: dict[str, Any], two: dict[str, Any]) -> str | None:
    """The difference in how text becomes ids, if any; later steps (post-processor, padding) are ignored."""
    a, b = _tokens(one), _tokens(two)
    different = sorted((t for t in a.keys() | b.keys() if a.get(t) != b.get(t)), key=str)
    if different:
        token = different[0]
        return f"{len(different)} tokens, such as {token!r} with id {a.get(token)} and {b.get(token)}"
    if _merges(one) != _merges(two):
        return "their merges"
    for part in ("normalizer", "pre_tokenizer"):
        if one.get(part) != two.get(part):
            return f"their {part}"
    return None


def _tokens(tokenizer: dict[str, Any]) -> dict[str, Any]:
    vocabulary = tokenizer["model"].get("vocab")
    if isinstance(vocabulary, list):  # unigram: pieces with scores, whose index is the id
        vocabulary = {str(piece): i for i, piece in enumerate(vocabulary)}
    added = {t.get("content"): t.get("id") for t in tokenizer.get("added_tokens") or () if isinstance(t, dict)}
    return (vocabulary if isinstance(vocabulary, dict) else {}) | added


def _merges(tokenizer: dict[str, Any]) -> list[str]:
    """Merges in either notation, "a b" or ["a", "b"]."""
    merges = tokenizer["model"].get("merges") or ()
    return [m if isinstance(m, str) else " ".join(map(str, m)) for m in merges]
