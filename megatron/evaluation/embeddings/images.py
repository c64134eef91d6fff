"""Reads images of a `.bin/.idx` pair as patches, one after another, for a model of `modality: patches`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.common.errors import UserError
from megatron.data.header import header_path
from megatron.data.image_sources import patch_form
from megatron.data.images import check_images, image, open_images, read_image_header
from megatron.evaluation.embeddings.texts import EncodedInput
from megatron.neox_arguments import NeoXArgs

_ROWS = 4096  # rows of the properties table that are in memory at once


class ImageReader:
    """Reads the images whose prefix is `embed.input`, as in training: the same patches in the same order.

    An image's id comes from the properties file next to the pair, or is its number. Raises DataError for images that
    the model cannot read.
    """

    def __init__(self, args: NeoXArgs) -> None:
        assert args.embed.input is not None  # checked with the configuration
        self.prefix, self._id_field = args.embed.input, args.embed.id_field
        check_images(self.prefix, args)
        self._file, self._info = open_images(self.prefix)
        self._form = patch_form(self.prefix, args)

    def read(self, start: int) -> Iterator[EncodedInput]:
        """Yield the images from number `start` on."""
        for number, identity in enumerate(image_ids(self.prefix, self._id_field)):
            if number >= start:
                sample = self._form.make(image(self._file, self._info, number), number)
                yield EncodedInput(number if identity is None else identity, sample["patches"].numpy())


def image_ids(prefix: str, id_field: str | None = "id") -> Iterator[Any]:
    """The id of every image, from the properties file next to the pair; None for images without one.

    Raises UserError if the properties belong to other images.
    """
    header = read_image_header(prefix)
    if header.properties is None or id_field is None:
        yield from [None] * header.documents
        return
    import pyarrow.parquet

    path = header_path(prefix).with_name(Path(header.properties).name)
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if table.metadata.num_rows != header.documents:
                raise UserError(
                    f"{path} has {table.metadata.num_rows} rows for {header.documents} images; import them again"
                )
            if id_field not in table.schema_arrow.names:
                yield from [None] * header.documents
                return
            for batch in table.iter_batches(_ROWS, columns=[id_field]):
                yield from batch[id_field].to_pylist()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
