"""Save a checkpoint that is complete or does not exist.

All ranks write into `global_stepN.tmp`, each file synced; they agree that every file was written; rank 0 adds the small
files and, last, the manifest, renames the folder and moves `latest`. Whenever a run is killed, `latest` names a
complete checkpoint. A rank that cannot write makes all ranks raise the same CheckpointError, and the partial folder is
removed.

`CheckpointWriter` implements the steps, none of which communicates. `save_checkpoint` runs them one after the other
while training waits; `background` runs them while training continues.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron.checkpoint.adapter_files import adapter_entries, lay_out
from megatron.checkpoint.discovery import PARTIAL, clean_leftovers, publish, tag_name
from megatron.checkpoint.facts import adapter_facts, facts_of
from megatron.checkpoint.layer_files import tensor_problems
from megatron.checkpoint.layer_set import expected_files
from megatron.checkpoint.manifest import FileEntry, Manifest, checksum, size_problems, write_manifest
from megatron.checkpoint.optimizer_files import OptimizerIndex
from megatron.checkpoint.owner import check_ownership, owning
from megatron.checkpoint.provenance import provenance
from megatron.checkpoint.rank_files import Contents, rank_contents, write_contents
from megatron.checkpoint.retention import apply_retention
from megatron.checkpoint.set_aside import set_aside_later
from megatron.checkpoint.state import TrainState
from megatron.common.errors import CheckpointError, one_line
from megatron.layout import TensorSplit
from megatron.parallel.collective_errors import RankGroup

if TYPE_CHECKING:
    from megatron.engine.protocol import Engine
    from megatron.neox_arguments import NeoXArgs

logger = logging.getLogger(__name__)

CONFIGS, HF, PARTS = "configs", "hf", "parts"


@contextlib.contextmanager
def owned_save_folder(ranks: RankGroup, save: str | None) -> Iterator[None]:
    """Own the save folder while the body runs, so that no other run writes into it. Collective.

    CheckpointError on all ranks if another run has the folder; a killed run's claim is taken over and logged.
    """
    with contextlib.ExitStack() as stack:
        if save is not None:
            line = None
            with ranks.together("taking the save folder"):
                if ranks.rank == 0:
                    line = stack.enter_context(owning(Path(save)))
            if line is not None:
                logger.info(line)
        yield


def prepare_save(engine: Engine, args: NeoXArgs, started_from: int | None = None) -> None:
    """Create the save folder, clear leftovers and check that all ranks can write; before the first step of training.

    `started_from` is the step in it that the run resumes; later ones are set aside. Collective. Only for the run that
    owns the folder: another run's save in progress would be removed.
    """
    assert args.save is not None
    ranks = RankGroup.world(engine.place.device)
    root = Path(args.save)
    with ranks.together("preparing the save folder"):
        if ranks.rank == 0:
            root.mkdir(parents=True, exist_ok=True)
            clean_leftovers(root)
            if started_from is not None:
                set_aside_later(root, started_from)
    with ranks.together("preparing the save folder"):
        if not os.access(root, os.W_OK | os.X_OK):
            raise CheckpointError(f"save: {root} cannot be written from this rank")


def save_checkpoint(engine: Engine, args: NeoXArgs, state: TrainState, *, data_fingerprints: Mapping[str, Any]) -> Path:
    """Save weights, optimizer, position and random states at `state.iteration` under `args.save`; returns the folder.

    Collective over all ranks. CheckpointError, the same on all ranks, if any rank could not write; earlier checkpoints
    are then untouched. They are thinned out (`keep_last_n_checkpoints`, `keep_optimizer_last_n`) after the new one is
    complete.
    """
    ranks = RankGroup.world(engine.place.device)
    writer = CheckpointWriter(engine, args, state, data_fingerprints)
    try:
        with ranks.together(writer.what):
            writer.open()
        with ranks.together(writer.what):
            writer.write(rank_contents(engine, args, state))
        with ranks.together(writer.what):
            writer.publish()
    except CheckpointError:
        with ranks.together(f"removing {writer.partial}"):  # before any rank ends and takes the others down
            writer.discard()
        raise
    logger.info(f"saved {writer.final}")
    writer.thin_out()
    return writer.final


class CheckpointWriter:
    """One checkpoint on its way to disk: `open`, `write`, `publish`, `thin_out` in this order, or `discard`.

    Every rank has a writer and calls every method; between two calls all ranks must have agreed that all succeeded. The
    position written is that of `state` when the writer was made.
    """

    def __init__(self, engine: Engine, args: NeoXArgs, state: TrainState, data_fingerprints: Mapping[str, Any]) -> None:
        assert args.save is not None
        self.args, self.state, self.data_fingerprints = args, replace(state), data_fingerprints
        self.place, self.rank = engine.place, engine.place.rank
        self.root = Path(args.save)
        self.final = self.root / tag_name(state.iteration)
        self.partial = self.root / (self.final.name + PARTIAL)
        self.what = f"saving {self.final}"

    def open(self) -> None:
        """Rank 0 creates the folder that all ranks write into."""
        if self.rank == 0:
            check_ownership(self.root)
            self.root.mkdir(parents=True, exist_ok=True)
            clean_leftovers(self.root)
            self.partial.mkdir()
            (self.partial / PARTS).mkdir()
            if self.state.base is not None:
                lay_out(self.partial, self.args, self.state.base.name, self.state.base.fingerprint)

    def write(self, contents: Contents) -> None:
        """Write this rank's files, and its part of the manifest beside them.

        The parts go through the file system, not by a gather to rank 0, for which 2,048 GPU ranks would each open a
        connection to it, with buffers in its GPU's memory.
        """
        entries = write_contents(self.partial, contents)
        (self.partial / PARTS / f"{self.rank}.json").write_text(Manifest(entries).to_json(), encoding="utf-8")

    def publish(self) -> None:
        """Rank 0 writes the small files, checks everything, writes the manifest and renames the folder into place."""
        if self.rank != 0:
            return
        files = self._take_parts()
        if self.state.base is not None:
            files |= adapter_entries(self.partial)
        files |= write_small_files(self.partial / HF, self.state.hf_files)
        merged = yaml.safe_dump(dict(self.args.merged), sort_keys=False).encode()
        files |= write_small_files(self.partial / CONFIGS, {"merged.yml": merged})
        manifest = Manifest(files, self._provenance())
        problems = self._weights_problems(files) + size_problems(self.partial, manifest)
        problems += OptimizerIndex.of(manifest, TensorSplit(self.args.trained_shape, self.place.tp)).problems()
        if problems:
            raise CheckpointError("; ".join(problems[:5]))
        write_manifest(self.partial, manifest)
        check_ownership(self.root)
        publish(self.partial, self.final)

    def thin_out(self) -> None:
        """Rank 0 removes older checkpoints, now that this one is complete."""
        if self.rank != 0:
            return
        try:
            keep = (self.args.keep_last_n_checkpoints, self.args.keep_optimizer_last_n)
            apply_retention(self.root, self.state.iteration, *keep, self.state.started_from)
        except (OSError, CheckpointError) as error:
            logger.warning(f"an old checkpoint could not be removed: {one_line(error)}")

    def discard(self) -> None:
        """Rank 0 removes what was written, after all ranks have stopped writing."""
        if self.rank == 0:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _take_parts(self) -> dict[str, FileEntry]:
        """Collect the manifest entries that the ranks wrote, and delete their folder."""
        folder, files = self.partial / PARTS, {}
        for rank in range(self.place.world_size):
            path = folder / f"{rank}.json"
            files.update(Manifest.from_json(path.read_text(encoding="utf-8"), str(path)).files)
        shutil.rmtree(folder)
        return files

    def _weights_problems(self, files: Mapping[str, FileEntry]) -> list[str]:
        if self.state.base is not None:
            return []  # the adapter's file is read back as a whole
        shape, tp = self.args.shape, self.place.tp
        return [
            f"{name}: {problem}"
            for name, rows in expected_files(shape, tp).items()
            for problem in (
                tensor_problems(files[name].tensors, rows, shape, tp) if name in files else ["was not written"]
            )
        ]

    def _provenance(self) -> dict[str, Any]:
        return provenance(
            iteration=self.state.iteration,
            consumed_samples=self.state.consumed_samples,
            train_batch_size=self.args.train_batch_size,
            merged=self.args.merged,
            shape=self.args.shape,
            precision=self.args.precision,
            layout=self.place.sizes,
            data=self.data_fingerprints,
            facts=facts_of(self.args),
        ) | adapter_facts(self.args, self.state.base)


def write_small_files(folder: Path, contents: Mapping[str, bytes]) -> dict[str, FileEntry]:
    """Write `contents` (path in the folder -> bytes), synced; manifest entries named `<folder name>/<path>`."""
    entries = {}
    for name, content in sorted(contents.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        entries[f"{folder.name}/{name}"] = FileEntry(len(content), {}, checksum(content))
    return entries


def read_small_files(folder: Path) -> dict[str, bytes]:
    """The files below `folder` by their path in it; empty if there is no such folder."""
    with contextlib.suppress(FileNotFoundError):
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {}
