"""Build and check the data of a run before its job starts, on one CPU: training then only reads.

    python tools/datasets/build_indices.py configs/llama31_8b/model.yml my_run.yml --world-size 64

takes the YAML files of the run, opens every source, compares the tokenizer with the one that made the data, and
writes the index of every source beside it. `--check-content` also reads all tokens and compares their checksums.
The number of ranks matters because it fixes how many samples a step takes.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("yml", nargs="+", help="the YAML files of the run, as for deepy.py")
    p.add_argument("--world-size", type=int, help="ranks of the run, where the files do not say")
    p.add_argument("--check-content", action="store_true", help="read everything and compare checksums")
    return p


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    from megatron.data.build import build_datasets
    from megatron.data.indexed import DataError
    from megatron.neox_arguments import ConfigError, NeoXArgs
    from megatron.tokenizer import TokenizerError

    start = time.monotonic()
    try:
        args = NeoXArgs.from_ymls(options.yml, world_size=options.world_size)
        datasets = build_datasets(args)
        if options.check_content:
            for prefix in datasets.fingerprints:
                print(check_content(prefix))
    except (ConfigError, DataError, TokenizerError, OSError) as error:
        print(f"build_indices.py: {error}", file=sys.stderr)
        return 1
    for note in datasets.notes:
        print(note)
    for name, dataset in [*datasets.valid.items(), *datasets.test.items()]:
        print(f"evaluation: {name}: {len(dataset)} samples")
    print(f"{len(datasets.fingerprints)} sources are ready, {time.monotonic() - start:.1f} s")
    return 0


def check_content(prefix: str) -> str:
    """Read a whole source; a line that says what was compared. Raises DataError where something disagrees."""
    from megatron.data.header import file_crc32, read_header
    from megatron.data.indexed import DataError, IndexedFile, bin_path

    IndexedFile(prefix).check_offsets()
    header = read_header(prefix)
    if header is None:
        return f"{prefix}: offsets are right; no header, so no checksum"
    found = file_crc32(bin_path(prefix))
    if found != header.crc32:
        raise DataError(
            f"{bin_path(prefix)}: checksum {found}, its header says {header.crc32}; the file is damaged, copy it again"
        )
    return f"{prefix}: offsets and checksum are right"


if __name__ == "__main__":
    sys.exit(main())
