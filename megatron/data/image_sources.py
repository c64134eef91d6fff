"""The images of one pair as samples, one each: endless for training, once through for validation."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron.data.images import image, open_images
from megatron.data.indexed import DataError
from megatron.data.patch_form import PatchForm
from megatron.data.sample import Sample, SampleSource
from megatron.data.sources import SAMPLES, seeded_permutation
from megatron.neox_arguments import NeoXArgs


class ImageSource(SampleSource):
    """The images of a range, in a new random order each epoch; with `samples` None, once in a fixed random order.

    A longer run begins exactly like a shorter one.
    """

    def __init__(
        self,
        prefix: str,
        form: PatchForm,
        seed: int,
        samples: int | None = None,
        documents: tuple[int, int] | None = None,
    ) -> None:
        self.prefix, self.form = prefix, form
        self._file, self._info = open_images(prefix)
        self._start, stop = documents or (0, len(self._file))
        self._count = stop - self._start
        if self._count < 1:
            raise DataError(f"{prefix}: there are no images {self._start} to {stop}; nothing can be learned")
        self._seed = seed
        self._length = self._count if samples is None else samples
        self.samples_per_epoch = self._count

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        return self.read(index, index)

    def image_number(self, index: int) -> int:
        """Number of the image that is sample `index` in reading order, and its row in the properties."""
        epoch, place = divmod(index, self._count)
        return self._start + int(_order(self._seed, epoch, self._count)[place])

    def read(self, index: int, sample_id: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.form.make(image(self._file, self._info, self.image_number(index)), sample_id)

    def padding(self) -> Sample:
        return self.form.padding()


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.integer]:
    return seeded_permutation(seed, epoch, SAMPLES, count)


def patch_form(prefix: str, args: NeoXArgs) -> PatchForm:
    """How a run reads the images of a pair, which `check_images` has checked."""
    patches = args.patches
    assert patches is not None
    _, info = open_images(prefix)
    mean = [0.0] if patches.mean is None else patches.mean
    fill = tuple(mean) if len(mean) == patches.channels else tuple(mean) * patches.channels
    return PatchForm(patches.size, patches.order, args.seq_length, fill, info.dtype)
