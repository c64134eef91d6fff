"""SHA-256 of files, of folders, and of a JSON document that contains its own digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.release.recipe import ReleaseError

PROVENANCE = "provenance.json"
_DIGEST = "digest"
_CHUNK = 1 << 24


def file_facts(path: Path) -> dict[str, Any]:
    """The size in bytes and the SHA-256 of a file."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            total.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": total.hexdigest()}


def folder_facts(folder: Path) -> dict[str, dict[str, Any]]:
    """`file_facts` of every file except the provenance itself, by path relative to the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / PROVENANCE)
    return {path.relative_to(folder).as_posix(): file_facts(path) for path in files}


def sealed(content: Mapping[str, Any]) -> str:
    """JSON text of `content` with its own digest, so that changes are detected."""
    return json.dumps({**content, _DIGEST: _digest(content)}, indent=1, ensure_ascii=False) + "\n"


def unsealed(path: Path) -> tuple[dict[str, Any], str | None]:
    """Read (content without its digest, problem if the digest is wrong). ReleaseError if `path` is not a provenance."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        given = content.pop(_DIGEST)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ReleaseError(f"{path} is not the {PROVENANCE} of a release: {error!r}") from None
    if text != sealed(content) or given != _digest(content):
        return content, f"{PROVENANCE} was changed: its content does not match its digest"
    return content, None


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, indent=1, ensure_ascii=False).encode()).hexdigest()
