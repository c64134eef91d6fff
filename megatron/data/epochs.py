"""In which order documents and samples are read: the index of a source, built once, kept beside the data.

A source is an endless stream: its documents in a new random order every epoch, one epoch behind the other. Sample k is
the tokens k*s to k*s + s of that stream (GPT-NeoX's running pack: neighbours share a token, documents and epochs are
crossed), and the samples that begin in an epoch are read in a random order. Everything is drawn epoch by epoch, so a
longer run begins exactly like a shorter one. GPT-NeoX and megatron-core shuffle all epochs at once, and train_iters
then changes the order from the first sample on.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.data.header import fingerprint
from megatron.data.indexed import DataError, open_indexed

CACHE_FOLDER = "index_cache"
_DOCUMENTS, _SAMPLES = 0, 1  # the two uses of the seed


@dataclass(frozen=True)
class EpochPlan:
    """All that decides an index. `documents` is the half-open range of documents of the file that are used."""

    prefix: str
    documents: tuple[int, int]
    seq_length: int
    seed: int
    epochs: int
    tokens: int  # of one epoch

    def first_sample(self, epoch: int) -> int:
        """Number of the first sample that begins in `epoch`."""
        return -(-epoch * self.tokens // self.seq_length)

    @property
    def folder(self) -> Path:
        """Where the index is kept; the name changes with the content of the data and with every setting."""
        identity = {**asdict(self), "prefix": None, "data": fingerprint(self.prefix)["hash"], "version": 1}
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        path = Path(self.prefix)
        return path.parent / CACHE_FOLDER / f"{path.name}_{self.seq_length}s_{self.epochs}ep_{key}"


@dataclass(frozen=True)
class EpochIndex:
    """`order[e]`: document numbers of epoch e in reading order; `ends[e]`: where each ends, in tokens from the start of
    the epoch; `samples`: for the i-th sample read, which sample of the stream it is."""

    order: NDArray[np.integer]  # [epochs, documents]
    ends: NDArray[np.int64]  # [epochs, documents]
    samples: NDArray[np.integer]  # [first_sample(epochs)]


def count_tokens(prefix: str, documents: tuple[int, int]) -> int:
    """Tokens of a range of documents. Raises DataError if there is nothing to predict in it."""
    file = open_indexed(prefix)
    start, stop = documents
    tokens = 0
    if stop > start:
        tokens = int(file.offsets[stop - 1] - file.offsets[start]) // file.dtype.itemsize + int(file.sizes[stop - 1])
    if tokens < 2:
        raise DataError(f"{prefix}: documents {start} to {stop} hold {tokens} tokens; nothing can be learned from them")
    return tokens


def plan_epochs(prefix: str, documents: tuple[int, int], seq_length: int, seed: int, samples: int) -> EpochPlan:
    """The plan that serves the first `samples` samples of the stream. Raises DataError if the range holds no tokens."""
    tokens = count_tokens(prefix, documents)
    plan = EpochPlan(prefix, documents, seq_length, seed, 0, tokens)
    last_epoch = max(samples - 1, 0) * seq_length // tokens
    last_token = plan.first_sample(last_epoch + 1) * seq_length  # of the last sample that begins in that epoch
    return EpochPlan(prefix, documents, seq_length, seed, last_token // tokens + 1, tokens)


def build_index(plan: EpochPlan) -> EpochIndex:
    """Draw the index. RandomState's streams are frozen by numpy, so another numpy version resumes a run unchanged."""
    start, stop = plan.documents
    sizes = np.array(open_indexed(plan.prefix).sizes[start:stop])
    kind = np.int32 if stop < 2**31 else np.int64
    order = np.empty((plan.epochs, stop - start), kind)
    ends = np.empty((plan.epochs, stop - start), np.int64)
    total = plan.first_sample(plan.epochs)
    samples: NDArray[np.integer] = np.empty(total, np.uint32 if total < 2**32 else np.int64)
    for epoch in range(plan.epochs):
        permutation = np.random.RandomState([plan.seed, epoch, _DOCUMENTS]).permutation(stop - start)
        order[epoch] = permutation + start
        np.cumsum(sizes[permutation], dtype=np.int64, out=ends[epoch])
        first, behind = plan.first_sample(epoch), plan.first_sample(epoch + 1)
        samples[first:behind] = first + np.random.RandomState([plan.seed, epoch, _SAMPLES]).permutation(behind - first)
    return EpochIndex(order, ends, samples)


def prepare_index(plan: EpochPlan) -> Path | None:
    """Make sure the index of `plan` is on the disk and return its folder; of many processes that start at once, one
    builds. None if the data's folder cannot be written to: every process then keeps the index in its memory."""
    folder = plan.folder
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(exist_ok=True)
        with _locked(folder.with_name(folder.name + ".lock")):
            if not folder.is_dir():
                _write(build_index(plan), folder)
    except PermissionError as error:
        print(f"{plan.prefix}: no index is kept ({error}); every rank builds its own", file=sys.stderr)
        return None
    except OSError as error:
        if error.errno != 30:  # EROFS: a read-only file system is like a missing permission
            raise
        return None
    return folder


def load_index(plan: EpochPlan, folder: Path | None) -> EpochIndex:
    """The index of `plan`, mapped from `folder`. Raises DataError, naming the file, if it is damaged."""
    index = _built(plan) if folder is None else _mapped(folder)
    shape = (plan.epochs, plan.documents[1] - plan.documents[0])
    if index.order.shape != shape or index.ends.shape != shape or len(index.samples) != plan.first_sample(plan.epochs):
        raise DataError(f"{folder}: the index does not fit its data; remove this folder and run again")
    return index


@lru_cache(maxsize=64)
def _mapped(folder: Path) -> EpochIndex:
    arrays = []
    for name in ("order", "ends", "samples"):
        path = folder / f"{name}.npy"
        try:
            arrays.append(np.load(path, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"{path}: damaged index ({error}); remove the folder {folder} and run again, or run "
                f"tools/datasets/build_indices.py"
            ) from error
    return EpochIndex(*arrays)


@cache
def _built(plan: EpochPlan) -> EpochIndex:
    return build_index(plan)


def _write(index: EpochIndex, folder: Path) -> None:
    aside = folder.with_name(f"{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    aside.mkdir()
    try:
        for name, array in vars(index).items():
            np.save(aside / f"{name}.npy", array, allow_pickle=False)
        aside.rename(folder)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        if not folder.is_dir():  # where locks do not work, another process may have been first: its index is the same
            raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock, which ends with the process. File systems without locks cost double work only."""
    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
