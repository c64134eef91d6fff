"""`python -m megatron.checkpoint.verify DIR`: read every byte of a checkpoint and compare it with the manifest."""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from megatron.checkpoint.discovery import find_checkpoint
from megatron.checkpoint.manifest import MANIFEST_NAME, FileEntry, file_checksum, read_manifest
from megatron.checkpoint.torch_files import read_tensors, tensor_entry
from megatron.common.boundary import guarded
from megatron.common.errors import CheckpointError, one_line
from megatron.common.quantity import quantity


def verify_checkpoint(folder: Path, workers: int = 1) -> list[str]:
    """Problems of a checkpoint folder against its manifest: sizes, checksums of files and tensors, shapes, dtypes.

    Files that the manifest does not list are named too: nothing vouches for them. ManifestError without a manifest.
    """
    manifest = read_manifest(folder)
    with ThreadPoolExecutor(workers) as pool:  # checksums and reads release the interpreter lock
        results = pool.map(partial(_file_problems, folder), manifest.files.keys(), manifest.files.values())
        problems = [problem for found in results for problem in found]
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    unlisted = sorted(present - manifest.files.keys() - {MANIFEST_NAME})
    return problems + [f"{folder / name} is not in the manifest" for name in unlisted]


def _file_problems(folder: Path, name: str, entry: FileEntry) -> list[str]:
    path = folder / name
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            return [f"{path} has {size} bytes, the manifest says {entry.bytes}"]
        problems = []
        if entry.tensors and path.suffix == ".pt":  # an adapter's file has a checksum of the whole as well
            problems = _tensor_problems(path, entry)
        if not problems and entry.checksum is not None and (found := file_checksum(path)) != entry.checksum:
            problems = [f"{path} has checksum {found}, the manifest says {entry.checksum}"]
        return problems
    except (OSError, CheckpointError) as error:
        return [one_line(error)]


def _tensor_problems(path: Path, entry: FileEntry) -> list[str]:
    stored = read_tensors(path)
    problems = [f"{path}: {name} is missing" for name in entry.tensors if name not in stored]
    for name, tensor in stored.items():
        listed = entry.tensors.get(name)
        if listed is None:
            problems.append(f"{path}: {name} is not in the manifest")
            continue
        found = tensor_entry(tensor)
        for what in ("shape", "dtype", "checksum"):
            has, should = getattr(found, what), getattr(listed, what)
            if has != should:
                problems.append(f"{path}: {name} has {what} {has}, the manifest says {should}")
    return problems


def main(arguments: list[str] | None = None) -> int:
    """0 if every byte is as written, 1 if not, 2 if there is no checkpoint or no manifest to compare with."""
    parser = argparse.ArgumentParser(prog="python -m megatron.checkpoint.verify", description=__doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint (global_stepN) or the folder that holds `latest`")
    parser.add_argument(
        "--iteration", type=int, help="which checkpoint of a run folder; default: the one `latest` names"
    )
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="files read at a time")
    options = parser.parse_args(arguments)
    return guarded("verify", partial(_verify, options.folder, options.iteration, max(1, options.workers)))


def _verify(folder: Path, iteration: int | None, workers: int) -> int:
    if not (folder / MANIFEST_NAME).exists():
        folder = find_checkpoint(folder, iteration)
    problems = verify_checkpoint(folder, workers)
    manifest = read_manifest(folder)
    for problem in problems:
        print(problem, file=sys.stderr)
    total = sum(entry.bytes for entry in manifest.files.values())
    verdict = quantity(len(problems), "problem") if problems else "every byte is as written"
    print(f"{folder}: {quantity(len(manifest.files), 'file')}, {total:,} bytes: {verdict}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
