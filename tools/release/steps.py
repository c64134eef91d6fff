"""The content of each training step, from configuration and data alone: token ids, labels, and documents.

The order of samples is a function of configuration and data (`megatron.data.build`), so any machine that has both reads
the same samples. A document is named by its source and its number in that source, `astronomy_text_document:812`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.blend import Blend
from megatron.data.build import build_datasets
from megatron.data.sample import stack
from megatron.data.sampler import MicroBatches
from megatron.data.skip_ranges import SampleRanges
from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.keys.checkpoint import CheckpointKeys
from megatron.neox_arguments.keys.parallel import ParallelKeys
from megatron.neox_arguments.keys.precision import PrecisionKeys
from megatron.neox_arguments.keys.runtime import RuntimeKeys
from megatron.neox_arguments.keys.survival import SurvivalKeys
from megatron.neox_arguments.load import canonical
from tools.release.recipe import ReleaseError

# Keys for a run's layout, output folders and monitoring; none of them affects what a step reads.
_GROUPS = (ParallelKeys, RuntimeKeys, SurvivalKeys, CheckpointKeys, PrecisionKeys)
_ELSEWHERE = {name for group in _GROUPS for name in group.model_fields} - {"skip_sample_ranges"}
_ELSEWHERE |= {"train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "zero_optimization", "engine"}
_ELSEWHERE |= {"checkpoint_activations", "checkpoint_num_layers", "recompute", "recompute_layers", "load", "finetune"}
_ELSEWHERE |= {"virtual_pipe_parallel_size", "deepspeed_extra_args", "launcher"}
_ELSEWHERE |= {"valid_data_paths", "valid_data_weights", "valid_label_data_paths", "test_data_paths"}
PATHS = ("train_data_paths", "train_label_data_paths")


@dataclass(frozen=True)
class StepContent:
    """One step. `tokens` and `labels` [samples, seq_length]; `documents` of each sample, in reading order."""

    step: int
    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    documents: list[list[str]]

    @property
    def record(self) -> dict[str, Any]:
        """The recorded digests: SHA-256 over ids and labels (int64, little-endian) and over document names."""
        ids = hashlib.sha256(self.tokens.astype("<i8").tobytes() + self.labels.astype("<i8").tobytes()).hexdigest()
        names = "\n".join(" ".join(names) for names in self.documents)
        return {"step": self.step, "ids": ids, "documents": hashlib.sha256(names.encode()).hexdigest()}


class StepReader:
    """Rereads the steps of a stage.

    `config` holds the keys given to the run, `batch` and `train_iters` the values derived from them; `prefixes` maps
    the name of each data source to its location on this machine.
    """

    def __init__(
        self, config: Mapping[str, Any], batch: int, train_iters: int, prefixes: Mapping[str, Path], vocab_file: Path
    ) -> None:
        keys = portable(config)
        if keys.get("data_order") == "gpt-neox" or keys.get("data_path"):
            raise ReleaseError(
                "steps of data_order: gpt-neox and of data_path with split cannot be reread from their "
                "configuration alone; use train_data_paths, or leave the stage out with record_steps: 0"
            )
        for name in PATHS:
            if keys.get(name):
                keys[name] = [_moved(entry, prefixes) for entry in keys[name]]
        keys |= {"vocab_file": str(vocab_file), "train_batch_size": batch, "gradient_accumulation_steps": 1}
        keys |= {"distributed_backend": "gloo", "from_scratch": True, "train_iters": train_iters}
        keys.pop("train_epochs", None)
        args = NeoXArgs.from_dict(keys, world_size=1)
        blend = build_datasets(args).train
        assert isinstance(blend, Blend)
        self.blend = blend
        self.batches = MicroBatches(blend, batch, 0, 1, 1, skip=SampleRanges(args.skip_sample_ranges))

    def step(self, number: int) -> StepContent:
        """Read step `number`, counted from 1."""
        places = self.batches.sample_places(number - 1)
        samples = stack([self.blend[place] if place < len(self.blend) else self.blend.padding() for place in places])
        documents = [self._documents(place) for place in places if place < len(self.blend)]
        return StepContent(number, samples["tokens"].numpy(), samples["labels"].numpy(), documents)

    def _documents(self, place: int) -> list[str]:
        source = self.blend.sources[self.blend.mixture.source_of[place]]
        name = Path(source.prefix).name
        return [f"{name}:{document}" for document, _, _ in source.pieces(int(self.blend.mixture.within[place]))]


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's keys without those for paths and layout, with data paths reduced to names."""
    given = {canonical(key): value for key, value in config.items()}
    keys = {key: value for key, value in given.items() if key not in _ELSEWHERE}
    for name in PATHS:
        if keys.get(name):
            keys[name] = [_named(entry) for entry in keys[name]]
    return keys


def source_names(config: Mapping[str, Any]) -> list[str]:
    """Names of a run's data sources, including label files."""
    entries = [entry for key in PATHS for entry in config.get(key) or []]
    return list(dict.fromkeys(Path(entry["path"] if isinstance(entry, dict) else entry).name for entry in entries))


def _named(entry: Any) -> Any:
    return {**entry, "path": Path(entry["path"]).name} if isinstance(entry, dict) else Path(entry).name


def _moved(entry: Any, prefixes: Mapping[str, Path]) -> Any:
    name = entry["path"] if isinstance(entry, dict) else entry
    path = str(prefixes[name])
    return {**entry, "path": path} if isinstance(entry, dict) else path
