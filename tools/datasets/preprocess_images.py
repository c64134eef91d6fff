"""Images -> `.bin/.idx`, for runs with `modality: patches`.

    python tools/datasets/preprocess_images.py --input galaxies/ --output-prefix data/galaxies

writes `data/galaxies.bin`, `.idx`, `.json` (the header that training checks: shape, bands, mean and standard deviation)
and `.parquet` (a row for each image: its id and properties). Inputs are PNG and JPEG pictures, FITS files with one or
more planes, .npz archives with an array `images`, and Parquet files with a column of pictures; files, globs and folders
are accepted. Every image must have the shape and type of the first one; unusable images are left out, named and
counted. The output is the same, byte for byte, for any number of workers. A killed run continues where it stopped when
restarted with the same arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", nargs="+", required=True, help="files, globs or folders")
    p.add_argument("--output-prefix", required=True, help="outputs are PREFIX.{bin,idx,json,parquet}")
    p.add_argument("--bands", nargs="+", help="names of the bands (default: r g b for three, else band0, band1, ...)")
    p.add_argument("--crop", type=int, help="keep the central square of each image, this many pixels wide")
    p.add_argument("--image-column", default="image", help="column of Parquet files with the pictures (default: image)")
    p.add_argument("--id-column", help="column of Parquet files and of --properties with the ids (default: id)")
    p.add_argument("--properties", type=Path, help="Parquet or CSV file with more properties, by id")
    p.add_argument("--axes", choices=["hwc", "chw"], help="arrays have height, width, bands (default) or bands first")
    p.add_argument(
        "--nan", choices=["refuse", "mask"], default="refuse", help="leave out images with NaN, or keep them"
    )
    p.add_argument(
        "--on-bad-image", choices=["fatal", "skip"], default="skip", help="stop at an unusable image, or count it"
    )
    p.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)")
    return p


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    from megatron.common.boundary import guarded

    return guarded(
        "preprocess_images.py", lambda: import_images(options), "stopped; the same command continues from here"
    )


def import_images(options: argparse.Namespace) -> None:
    """Run the import. Raises UserError, OSError."""
    from megatron.data.indexed import DataError
    from tools.datasets.imaging.decode import Axes, ImageDecoder, ImageError, read_image, refuse_swapped_axes, require
    from tools.datasets.imaging.importing import ImageImport, run_import
    from tools.datasets.imaging.joining import PropertyTable
    from tools.datasets.imaging.parquet import ParquetShard
    from tools.datasets.imaging.sources import ID, Archive, find_sources, items_of, per_block

    require("pyarrow", "writing properties")
    if options.workers < 1:
        raise DataError(f"--workers {options.workers}: at least one is needed")
    if options.crop is not None and options.crop < 1:
        raise DataError(f"--crop {options.crop}: at least one pixel is needed")
    table = None if options.properties is None else PropertyTable(options.properties, options.id_column or ID)
    sources = find_sources(options.input, lambda path: ParquetShard(path, options.image_column, options.id_column))
    for source in sources:
        if isinstance(source, Archive) and options.axes is None:
            refuse_swapped_axes(source.image_shape)
    axes: Axes = options.axes or "hwc"
    for item in items_of(sources):  # the first readable image sets shape and type for all
        try:
            first = read_image(item, axes)
            decoder = ImageDecoder.like(first, options.crop, axes, options.nan == "mask")
            break
        except ImageError:
            continue
    else:
        raise DataError("none of the images can be read; is --input right?")
    count = decoder.shape[2]
    bands = options.bands or (["r", "g", "b"] if count == 3 else [f"band{number}" for number in range(count)])
    if len(bands) != count:
        raise DataError(f"--bands names {len(bands)} bands, the images have {count}")
    # A killed run is resumed only with equal settings.
    stamp = None if table is None else (str(table.path), table.path.stat().st_size, table.path.stat().st_mtime_ns)
    settings = (
        options.crop,
        axes,
        options.nan,
        options.on_bad_image,
        options.image_column,
        options.id_column,
        stamp,
    )
    job = ImageImport(
        options.input,
        sources,
        decoder,
        per_block(first.nbytes),
        bands,
        options.output_prefix,
        options.workers,
        options.on_bad_image == "fatal",
        settings,
        table,
    )
    header = run_import(job)
    if table is not None and table.missing:
        print(f"{table.missing:,} images have no row in {table.path}: their properties are empty", file=sys.stderr)
    info = header.images
    reasons = ", ".join(f"{count:,} {rule}" for rule, count in header.left_out.items())
    print(
        f"{options.output_prefix}: {header.documents:,} images of {info.height} x {info.width} x {len(info.bands)} "
        f"({info.dtype}), mean {_shown(info.mean)}, std {_shown(info.std)}; left out: {reasons or 'none'}"
        + (f" (named in {options.output_prefix}.left_out.txt)" if reasons else ""),
        file=sys.stderr,
    )


def _shown(values: list[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


if __name__ == "__main__":
    sys.exit(main())
