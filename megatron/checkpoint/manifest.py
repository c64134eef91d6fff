"""`manifest.json`: every file of a checkpoint with its size, every tensor with shape, dtype and checksum.

The manifest is written last into a checkpoint folder, so its presence shows that the files it lists were written and
synced. The converter writes the same format. Standard library only: a login node can use it.

    {"format": "neox-llama-checkpoint", "version": 2,
     "files": {"layer_00-model_00-model_states.pt":
                 {"bytes": 1234,
                  "tensors": {"word_embeddings.weight":
                    {"shape": [512, 64], "dtype": "bfloat16", "checksum": "crc32:0123abcd"}}},
               "rank_00000_optim_states.safetensors":
                 {"bytes": 5678, "tensors": {}, "checksum": "crc32:01234567",
                  "random_state": {"offset": 5000, "bytes": 678, "crc32": "89abcdef"},
                  "ranges": [{"layer": 0, "tensor": "word_embeddings.weight", "tp_rank": 0, "start": 0, "stop": 64,
                              "step": 10, "master": {"offset": 640, "crc32": "0123abcd"}, "exp_avg": {...}, ...}]},
               "hf/config.json": {"bytes": 700, "tensors": {}, "checksum": "crc32:89abcdef"}},
     "provenance": {...},
     "digest": "crc32:..."}

File names are relative to the folder, with `/`. A tensor's checksum is `zlib.crc32` of its contiguous little-endian
bytes; layer files have one for each tensor. Any other file has a `checksum` of the whole file instead. `ranges` is the
index of the optimizer's state (`state_ranges`); version 1 has none, its optimizer files are DeepSpeed's.
`digest` is the checksum of the manifest's other content, written as above.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from megatron.checkpoint.state_ranges import StateRange, StoredBytes
from megatron.common.atomic_files import write_text
from megatron.common.crc import crc32
from megatron.common.errors import CheckpointError

FORMAT = "neox-llama-checkpoint"
VERSION = 2
READABLE = (1, VERSION)
MANIFEST_NAME = "manifest.json"
_CHECKSUM = re.compile(r"crc32:[0-9a-f]{8}")
_DIGEST = "digest"
_CHUNK = 1 << 24  # bytes read at a time for the checksum of a whole file


class ManifestError(CheckpointError):
    """The manifest is missing, unreadable or of another format."""


def format_checksum(crc: int) -> str:
    return f"crc32:{crc & 0xFFFFFFFF:08x}"


def checksum(data: bytes | memoryview) -> str:
    """Checksum of raw bytes; for a tensor, of its contiguous storage (`tensor.view(torch.uint8).numpy()`)."""
    return format_checksum(crc32(data))


def file_checksum(path: Path) -> str:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            crc = crc32(chunk, crc)
    return format_checksum(crc)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a layer file; `dtype` is torch's name without the prefix, such as "bfloat16"."""

    shape: tuple[int, ...]
    dtype: str
    checksum: str


@dataclass(frozen=True)
class FileEntry:
    """One file: its size in bytes and either its tensors or a checksum of the whole file.

    An optimizer file also has its `ranges` and its rank's random states.
    """

    bytes: int
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    checksum: str | None = None
    ranges: tuple[StateRange, ...] = ()
    random_state: StoredBytes | None = None


@dataclass(frozen=True)
class Manifest:
    """All files of a checkpoint folder but the manifest itself, and where the checkpoint comes from."""

    files: dict[str, FileEntry]
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        files: dict[str, Any] = {}
        for name, entry in sorted(self.files.items()):
            tensors = {
                tensor: {"shape": list(t.shape), "dtype": t.dtype, "checksum": t.checksum}
                for tensor, t in entry.tensors.items()
            }
            files[name] = {"bytes": entry.bytes, "tensors": tensors}
            if entry.checksum is not None:
                files[name]["checksum"] = entry.checksum
            if entry.ranges:
                files[name]["ranges"] = [part.to_json() for part in entry.ranges]
            if entry.random_state is not None:
                files[name]["random_state"] = entry.random_state.to_json()
        body = {"format": FORMAT, "version": VERSION, "files": files, "provenance": self.provenance}
        return json.dumps(body | {_DIGEST: _digest(body)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = MANIFEST_NAME) -> Manifest:
        """Parse and check a manifest; ManifestError names `source` and the first fault."""
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"{source} is not JSON: {error}") from error
        body = dict(_mapping(body, source))
        digest = body.pop(_DIGEST, None)  # manifests of earlier versions have none
        if body.get("format") != FORMAT or body.get("version") not in READABLE:
            raise ManifestError(
                f"{source} says format {body.get('format')!r}, version {body.get('version')!r}; "
                f"this program reads {FORMAT!r}, version {' and '.join(map(str, READABLE))}"
            )
        foreign = sorted(body.keys() - {"format", "version", "files", "provenance"})
        if foreign:
            raise ManifestError(f"{source} has the key {foreign[0]!r}, which no manifest has: it is damaged or foreign")
        if digest is not None and digest != _digest(body):
            raise ManifestError(
                f"{source} is damaged: its content has {_digest(body)}, it says {digest!r}. Take the checkpoint from "
                f"another copy, or go back to an earlier one with --iteration N"
            )
        files = {}
        for name, entry in _mapping(body.get("files"), f"{source}: files").items():
            where = f"{source}: {name}"
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise ManifestError(f"{where} lies outside of the checkpoint folder")
            entry = _mapping(entry, where)
            tensors = {
                tensor: _tensor_entry(value, f"{where}: {tensor}")
                for tensor, value in _mapping(entry.get("tensors"), f"{where}: tensors").items()
            }
            whole, size = entry.get("checksum"), _size(entry.get("bytes"), where)
            ranges, random_state = _state(entry, size, where)
            files[name] = FileEntry(
                bytes=size,
                tensors=tensors,
                checksum=None if whole is None else _checksum(whole, where),
                ranges=ranges,
                random_state=random_state,
            )
        return cls(files, dict(_mapping(body.get("provenance", {}), f"{source}: provenance")))


def _digest(body: Mapping[str, Any]) -> str:
    """Checksum of a manifest's own content, so that a flipped byte in it does not go unnoticed."""
    return checksum(json.dumps(body, indent=1).encode())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `folder/manifest.json` durably and atomically."""
    write_text(folder / MANIFEST_NAME, manifest.to_json())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder (`global_stepN`); ManifestError if there is none or it is not one."""
    path = folder / MANIFEST_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path} cannot be read: {error}") from error
    return Manifest.from_json(text, str(path))


def size_problems(folder: Path, manifest: Manifest) -> list[str]:
    """One sentence for each listed file that is absent or has another size; empty if all are as written."""
    problems = []
    for name, entry in manifest.files.items():
        path = folder / name
        try:
            size = path.stat().st_size
        except OSError:
            problems.append(f"{path} is missing")
            continue
        if size != entry.bytes:
            problems.append(f"{path} has {size} bytes, the manifest says {entry.bytes}")
    return problems


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ManifestError(f"{where} must be a mapping, got {type(value).__name__}")
    return value


def _size(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ManifestError(f"{where}: a size must be an integer of at least 0, got {value!r}")
    return value


def _checksum(value: Any, where: str) -> str:
    if not isinstance(value, str) or not _CHECKSUM.fullmatch(value):
        raise ManifestError(f"{where}: a checksum must look like crc32:0123abcd, got {value!r}")
    return value


def _tensor_entry(value: Any, where: str) -> TensorEntry:
    value = _mapping(value, where)
    shape, dtype = value.get("shape"), value.get("dtype")
    if not isinstance(shape, list) or not isinstance(dtype, str):
        raise ManifestError(f"{where} needs a shape and a dtype, got {dict(value)!r}")
    return TensorEntry(tuple(_size(n, where) for n in shape), dtype, _checksum(value.get("checksum"), where))


def _state(entry: Mapping[str, Any], size: int, where: str) -> tuple[tuple[StateRange, ...], StoredBytes | None]:
    """The index of an optimizer file of `size` bytes; empty for any other."""
    ranges, random_state = entry.get("ranges", []), entry.get("random_state")
    if not isinstance(ranges, list):
        raise ManifestError(f"{where}: ranges must be a list, got {type(ranges).__name__}")
    try:
        return (
            tuple(StateRange.from_json(value, size) for value in ranges),
            None if random_state is None else StoredBytes.from_json(random_state, size),
        )
    except ValueError as error:
        raise ManifestError(f"{where}: {error}") from error
