"""Cut documents into halves, `ID#1` and `ID#2`, for the retrieval test."""

from __future__ import annotations

import json
from pathlib import Path

from megatron.common.atomic_files import replacing
from megatron.evaluation.embeddings.records import read_records
from tools.probe.errors import ProbeError

FIRST, SECOND = "#1", "#2"


def split_in_halves(text: str) -> tuple[str, str]:
    """Split a text at the white space nearest to its middle. ValueError if it is a single word."""
    text = text.strip()
    middle = len(text) // 2
    before = max((text.rfind(space, 0, middle + 1) for space in " \n\t"), default=-1)
    after = min((place for space in " \n\t" if (place := text.find(space, middle)) >= 0), default=-1)
    places = [place for place in (before, after) if place > 0]
    if not places:
        raise ValueError("one word")
    cut = min(places, key=lambda place: abs(place - middle))
    return text[:cut].rstrip(), text[cut:].lstrip()


def write_halves(
    path: Path, output: Path, *, text_field: str, id_field: str, min_words: int, limit: int | None
) -> tuple[int, int]:
    """Write the halves of every document of at least `min_words` words as JSON lines.

    Returns (documents written, shorter documents left out). Raises ProbeError for a record without text.
    """
    written = shorter = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as temporary, temporary.open("w", encoding="utf-8") as file:
        for number, (where, record) in enumerate(read_records(path, [text_field, id_field])):
            try:
                content = json.loads(record) if isinstance(record, bytes) else record
                text, name = content[text_field], content.get(id_field, number)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ProbeError(f"{where}: expected a record with {text_field}") from None
            if not isinstance(text, str):
                raise ProbeError(f"{where}: {text_field} is of type {type(text).__name__}, expected a string")
            if len(text.split()) < max(min_words, 2):
                shorter += 1
                continue
            for suffix, half in zip((FIRST, SECOND), split_in_halves(text), strict=True):
                file.write(json.dumps({"id": f"{name}{suffix}", "text": half}, ensure_ascii=False) + "\n")
            written += 1
            if written == limit:
                break
        if written < 2:
            raise ProbeError(f"{path} has {written} documents of at least {min_words} words; 2 are needed")
    return written, shorter
