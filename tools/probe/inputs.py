"""The baseline without a network: linear components of the inputs themselves.

Arrays are reduced by PCA, texts by a truncated SVD of their TF-IDF table. Both are fitted to the fit set only; the
number of components that a probe reads is chosen by cross-validation, like a layer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.evaluation.embeddings.records import read_records
from tools.probe.errors import ProbeError
from tools.probe.features import Features, read_features

COMPONENTS = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class RawInputs:
    """Inputs by id: texts, or arrays, of which the first layer is used."""

    path: Path
    ids: list[str]
    texts: list[str] | None
    arrays: Features | None

    def reduced(self, fit: Sequence[str], others: Sequence[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Components of `fit` and `others`, each [items, k], the largest first; the size of the fit set limits k."""
        places = {name: row for row, name in enumerate(self.ids)}
        missing = [name for name in (*fit, *others) if name not in places]
        if missing:
            raise ProbeError(f"{self.path} has no input of {len(missing)} items, such as {missing[0]}")
        rows = [np.array([places[name] for name in part], dtype=np.int64) for part in (fit, others)]
        if self.texts is not None:
            return _text_components([[self.texts[row] for row in part] for part in rows], seed)
        assert self.arrays is not None
        return _components([self.arrays.layer(self.arrays.layers[0], part) for part in rows], seed)


def read_inputs(path: Path, text_field: str = "text", id_field: str = "id") -> RawInputs:
    """Read texts (.jsonl, .parquet), arrays (.npy with ids next to it) or images (the prefix of a .bin/.idx pair).

    Arrays and images are flattened.
    """
    if path.suffix == ".npy":
        arrays = read_features(path)
        return RawInputs(path, arrays.ids, None, arrays)
    if path.with_name(path.name + ".idx").is_file():
        arrays = _images(path)
        return RawInputs(path, arrays.ids, None, arrays)
    ids, texts = [], []
    for number, (where, record) in enumerate(read_records(path, [text_field, id_field])):
        try:
            content: Any = json.loads(record) if isinstance(record, bytes) else record
            text, name = content[text_field], content.get(id_field, number)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ProbeError(f"{where}: expected a record with {text_field}") from None
        ids.append(str(name))
        texts.append(str(text))
    return RawInputs(path, ids, texts, None)


def _images(prefix: Path) -> Features:
    """Pixels [images, 1, height x width x bands], memory-mapped from the file."""
    from megatron.data.images import open_images
    from megatron.evaluation.embeddings.images import image_ids

    file, info = open_images(str(prefix))
    ids = [str(number if name is None else name) for number, name in enumerate(image_ids(str(prefix)))]
    pixels = np.memmap(prefix.with_name(prefix.name + ".bin"), file.dtype, "r")
    return Features(prefix, ids, (0,), pixels.reshape(len(ids), 1, -1)[:, :, : int(np.prod(info.shape))])


def _components(parts: list[np.ndarray], seed: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.decomposition import PCA

    fit, others = parts
    if np.isnan(fit).any() or np.isnan(others).any():  # unmeasured pixels: their mean over the fit set
        known = np.isfinite(fit)
        means = np.where(known, fit, 0).sum(0) / np.maximum(known.sum(0), 1)
        fit, others = (np.where(np.isnan(part), means, part) for part in (fit, others))
    most = min(max(COMPONENTS), len(fit) - 1, fit.shape[1])
    pca = PCA(most, svd_solver="randomized", random_state=seed).fit(fit)
    return pca.transform(fit), pca.transform(others)


def _text_components(parts: list[list[str]], seed: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True, max_features=100_000)
    fit, others = vectorizer.fit_transform(parts[0]), vectorizer.transform(parts[1])
    most = min(max(COMPONENTS), len(parts[0]) - 1, fit.shape[1] - 1)
    svd = TruncatedSVD(most, random_state=seed).fit(fit)
    return svd.transform(fit), svd.transform(others)
