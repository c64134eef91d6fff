"""Build and check the data of a run before its job starts, on one CPU, so that training only has to read it.

    python tools/datasets/build_indices.py configs/llama31_8b/model.yml my_run.yml --world-size 64

takes the YAML files of the run, opens every source, compares the tokenizer with the one that produced the data, and
writes each source's index next to it. `--check-content` also reads all tokens, verifies their checksums and looks for
ids outside the vocabulary. The number of ranks matters because it determines the number of samples per step.
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
    p.add_argument("--world-size", type=int, help="ranks of the run, if the files do not give it")
    p.add_argument(
        "--check-content", action="store_true", help="read everything: verify checksums and the range of ids"
    )
    return p


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    from megatron.common.boundary import guarded

    return guarded("build_indices.py", lambda: build(options), "stopped; completed files are kept")


def build(options: argparse.Namespace) -> None:
    """Build and check every source. Raises UserError, OSError."""
    from megatron.common.quantity import quantity
    from megatron.data.build import build_datasets
    from megatron.neox_arguments import NeoXArgs

    start = time.monotonic()
    args = NeoXArgs.from_ymls(options.yml, world_size=options.world_size)
    datasets = build_datasets(args)
    if options.check_content:
        paths = (args.train_label_data_paths, args.valid_label_data_paths, args.test_label_data_paths)
        labels = {path for group in paths for path in group or ()}
        for prefix in datasets.fingerprints:
            if args.reads_images:
                print(check_images_content(prefix))
            else:
                print(check_content(prefix, args.vocab_size, prefix in labels))
    for note in datasets.notes:
        print(note)
    for name, dataset in [*datasets.valid.items(), *datasets.test.items()]:
        print(f"evaluation: {name}: {quantity(len(dataset), 'sample')}")
    print(f"{quantity(len(datasets.fingerprints), 'source')} ready, {time.monotonic() - start:.1f} s")


def check_images_content(prefix: str) -> str:
    """Read all images of a source; returns a line that states what was compared. DataError on any mismatch."""
    from megatron.data.header import file_crc32
    from megatron.data.images import open_images, read_image_header
    from megatron.data.indexed import DataError, bin_path

    file, _ = open_images(prefix)
    file.check_offsets()
    found, said = file_crc32(bin_path(prefix)), read_image_header(prefix).crc32
    if found != said:
        raise DataError(
            f"{bin_path(prefix)}: checksum {found}, but {said} in its header; the file is damaged, copy it again"
        )
    return f"{prefix}: offsets and checksum are correct"


def check_content(prefix: str, vocab_size: int, labels: bool = False) -> str:
    """Read a whole source; returns a line that states what was compared. DataError on any mismatch."""
    from megatron.data.header import file_crc32, read_header
    from megatron.data.indexed import DataError, IndexedFile, bin_path
    from megatron.data.token_ids import refuse_outside, scan_ids
    from tools.datasets.encoding.progress import Progress

    file = IndexedFile(prefix)
    file.check_offsets()
    progress = Progress(2 * bin_path(prefix).stat().st_size)

    def read(count: int) -> None:
        progress.read += count
        if progress.due(progress.read):
            print(f"{prefix}: {progress.left()}", file=sys.stderr, flush=True)

    refuse_outside(prefix, *scan_ids(file, read), vocab_size, labels=labels)
    header = read_header(prefix)
    if header is None:
        return f"{prefix}: offsets are correct, ids are in the vocabulary; no header, so no checksum"
    found = file_crc32(bin_path(prefix), read)
    if found != header.crc32:
        raise DataError(
            f"{bin_path(prefix)}: checksum {found}, but {header.crc32} in its header; "
            f"the file is damaged, copy it again"
        )
    return f"{prefix}: offsets, ids and checksum are correct"


if __name__ == "__main__":
    sys.exit(main())
