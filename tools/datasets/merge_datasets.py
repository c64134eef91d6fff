"""Merge the `.bin/.idx` pairs of a folder into one, with GPT-NeoX's flags.

    python tools/datasets/merge_datasets.py --input data/shards --output-prefix data/corpus_text_document

The documents of all pairs are concatenated in the order of the pairs' names. All pairs must hold tokens of the same
type and, if they have headers (`.json`), from the same tokenizer; the output's header has the totals.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

CHUNK = 1 << 16  # documents copied at once


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", required=True, type=Path, help="folder of the pairs")
    p.add_argument("--output-prefix", required=True, help="path of the output without suffix")
    options = p.parse_args(arguments)
    from megatron.common.boundary import guarded

    return guarded("merge_datasets.py", lambda: merge(options.input, Path(options.output_prefix)))


def merge(folder: Path, output: Path) -> None:
    """Merge all pairs of `folder`. Raises DataError or OSError and then leaves nothing behind."""
    from megatron.common.atomic_files import write_text
    from megatron.data.header import file_crc32, header_path, read_header
    from megatron.data.indexed import DataError, IndexedFile, IndexedWriter, bin_path
    from megatron.data.joined_header import joined_header

    if not folder.is_dir():
        raise DataError(f"--input {folder}: no such folder")
    # Check all pairs before anything is written.
    stems = {suffix: {path.stem for path in folder.glob(f"*{suffix}")} for suffix in (".bin", ".idx")}
    alone = sorted(stems[".bin"] ^ stems[".idx"])
    if alone:
        raise DataError(f"{folder / alone[0]}: one of .bin and .idx is missing; copy the pair again or remove it")
    parts = [IndexedFile(str(folder / stem)) for stem in sorted(stems[".bin"])]
    if not parts:
        raise DataError(f"--input {folder}: no .bin/.idx pair in it")
    other = next((part for part in parts if part.dtype != parts[0].dtype), None)
    if other is not None:
        raise DataError(
            f"{other.prefix} holds {other.dtype}, {parts[0].prefix} {parts[0].dtype}: their vocabularies have "
            f"different sizes; preprocess them again"
        )
    if output.parent.resolve() == folder.resolve() and output.name in stems[".bin"]:
        raise DataError(f"--output-prefix {output} is one of the inputs; give another name")
    headers = [(str(part.prefix), read_header(part.prefix)) for part in parts]
    joined_header(headers, crc32="")  # rejects incompatible pairs before anything is copied
    # Copy the documents to a partial pair, then rename it.
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f"{output.name}.partial")
    writer = IndexedWriter(aside, parts[0].dtype)
    try:
        for part in parts:
            part.check_offsets()
            for first in range(0, len(part), CHUNK):
                last = min(first + CHUNK, len(part)) - 1
                begin = int(part.offsets[first]) // part.dtype.itemsize
                end = int(part.offsets[last]) // part.dtype.itemsize + int(part.sizes[last])
                writer.append(part.document(first, 0, end - begin).tobytes(), part.sizes[first : last + 1])
        writer.finish()
        header = joined_header(headers, file_crc32(bin_path(aside)))
        if header is not None:
            write_text(header_path(aside), header.model_dump_json(indent=2) + "\n")
    except BaseException:
        for suffix in (".bin", ".idx", ".sizes", ".json"):
            Path(f"{aside}{suffix}").unlink(missing_ok=True)
        raise
    for suffix in (".bin", ".idx", ".json") if header is not None else (".bin", ".idx"):
        os.replace(f"{aside}{suffix}", f"{output}{suffix}")
    tokens = writer.bytes // parts[0].dtype.itemsize
    print(f"{output}: {len(parts)} pairs, {writer.documents} documents, {tokens} tokens", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
