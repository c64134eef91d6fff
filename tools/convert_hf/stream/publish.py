"""An output folder that is either complete or absent: built as `NAME.partial`, synced, then renamed.

While a conversion runs, `NAME.partial` holds the files with their final sizes and one journal per share of the work.
The manifest is written last. With several hosts (`--shard i/n`), the last to finish completes the folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.checkpoint.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    TensorEntry,
    file_checksum,
    format_checksum,
    write_manifest,
)
from megatron.checkpoint.state_ranges import StateRange
from megatron.common.atomic_files import sync_file, sync_folder, write_text

from ..errors import ConvertError
from .copy import BandSource, Copier, CopyJournal, StoredBands, preallocate, tensor_crcs
from .plan import CopyPlan

if TYPE_CHECKING:  # needs numpy, which conversions do not import
    from .optimizer import StateCopy

_WORK = ".convert"  # folder of journals and shares inside NAME.partial, removed before the rename


@dataclass
class OutputFolder:
    """Everything that goes into the folder `final`.

    `extras` are small files by relative name: bytes, or a file to copy. `manifest_in` is the subfolder ("." for the
    top) that the manifest describes; it lists files of that subfolder only. `source` produces the bands and may add
    files that depend on all of them.
    """

    final: Path
    plan: CopyPlan
    extras: dict[str, bytes | Path]
    manifest_in: str
    provenance: dict[str, Any]
    left_behind: list[str] = field(default_factory=list)  # files of the source that are not copied
    shard: tuple[int, int] = (1, 1)
    threads: int = 4
    force: bool = False
    resume: bool = False
    source: BandSource = field(default_factory=StoredBands)
    optimizer: StateCopy | None = None  # goes into `manifest_in`
    partial: Path = field(init=False)

    def __post_init__(self) -> None:
        self.final = Path(os.path.abspath(self.final))
        self.partial = self.final.with_name(self.final.name + ".partial")

    @property
    def _work(self) -> Path:
        return self.partial / _WORK

    def check(self) -> None:
        """Reject an output that cannot succeed, before anything is written."""
        if self.final.exists() and not self.final.is_dir():
            raise ConvertError(f"--output {self.final} is a file; give a folder")
        if self.final.is_dir() and any(self.final.iterdir()):
            if not self.force:
                raise ConvertError(f"--output {self.final} exists; choose another folder, or replace it with --force")
            if not any((self.final / m).is_file() for m in (MANIFEST_NAME, f"{self.manifest_in}/{MANIFEST_NAME}")):
                raise ConvertError(
                    f"--output {self.final} was not written by this command (it has no {MANIFEST_NAME}), "
                    f"so --force does not replace it; remove it yourself or choose another folder"
                )
        if self.partial.exists() and not self.resume and not self.force and self.shard[1] == 1:
            raise ConvertError(
                f"{self.partial} is left over from an unfinished run: continue it with --resume, "
                f"or start over with --force"
            )
        parent = self.final.parent
        while not parent.is_dir():
            parent = parent.parent
        here = {path for path in self.all_paths() if path.exists()} if self.resume else set()
        allocated = sum(path.stat().st_blocks * 512 for path in here)
        free, needed = shutil.disk_usage(parent).free, self.bytes_written
        if needed > free + allocated:
            raise ConvertError(
                f"{parent} has {free + allocated:,} bytes free, the output needs {needed:,}; nothing was written"
            )

    @property
    def bytes_written(self) -> int:
        return self.plan.bytes_written + (self.optimizer.bytes_written if self.optimizer else 0)

    @property
    def bytes_to_copy(self) -> int:
        """Total of the bytes that `write` reports as progress."""
        return sum(job.nbytes for job in (*self.plan.jobs, *(self.optimizer.jobs if self.optimizer else ())))

    @property
    def whole(self) -> str:
        """Identifies the complete job of all shares."""
        return self.plan.whole + (self.optimizer.whole if self.optimizer else "")

    def plan_paths(self) -> list[Path]:
        return [self.partial / file.name for file in self.plan.files]

    def all_paths(self) -> list[Path]:
        """The files of this share that take up space."""
        folder, names = self.partial / self.manifest_in, self.optimizer.names if self.optimizer else []
        return self.plan_paths() + [folder / name for name in names]

    def write(self, progress: Callable[[int], None]) -> bool:
        """Do the whole job. False if other shares (`--shard`) are not finished; True once the folder is complete."""
        if self.force and self.shard[1] == 1 and not self.resume and self.partial.exists():
            shutil.rmtree(self.partial)
        self._work.mkdir(parents=True, exist_ok=True)
        number, count = self.shard
        journal_path = self._work / f"journal_{number}_of_{count}.jsonl"
        others = [p.name for p in self._work.glob("journal_*.jsonl") if not p.name.endswith(f"_of_{count}.jsonl")]
        if others:
            raise ConvertError(f"{self.partial} was started with another --shard count ({others[0]})")
        with open(self._work / f"lock_{number}", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConvertError(f"another process is writing {self.partial}; wait for it, or stop it") from None
            except OSError:
                pass  # a file system without locks
            entries = self._copy(journal_path, progress)
            if self.optimizer is not None:
                folder, journal = self.partial / self.manifest_in, self._work / f"optimizer_{number}_of_{count}.jsonl"
                states = self.optimizer.write(folder, journal, self.resume, progress)
                entries |= {self._prefix + name: entry for name, entry in states.items()}
            # Read by the other hosts: whoever finds all shares completes the folder.
            share = {"plan": self.whole, "files": entries, "summary": self.source.summary()}
            write_text(self._share_path(number), json.dumps(share))
        return self._finish_if_last()

    def _copy(self, journal_path: Path, progress: Callable[[int], None]) -> dict[str, Any]:
        """Write this share's files; return their manifest entries."""
        resume = self.resume and journal_path.exists()
        journal = CopyJournal(journal_path, self.plan.digest(), resume, self.source.account)
        try:
            for path, file in zip(self.plan_paths(), self.plan.files, strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                preallocate(path, file.size, keep=resume)
            progress(sum(self.plan.jobs[i].nbytes for i in journal.finished))
            Copier(self.plan, self.partial, self.threads, self.source).run(journal, progress)
            crcs = tensor_crcs(self.plan, journal.checksums)
        finally:
            journal.close()
            self.source.close()
        entries: dict[str, Any] = {}
        for path, file, by_tensor in zip(self.plan_paths(), self.plan.files, crcs, strict=True):
            with open(path, "r+b") as target:
                for offset, block in file.blocks(by_tensor):
                    target.seek(offset)
                    target.write(block)
                target.flush()
                os.fsync(target.fileno())
            entries[file.name] = {
                "bytes": file.size,
                "tensors": {
                    t.stored.name: [
                        list(t.stored.shape),
                        t.stored.dtype.name,
                        format_checksum(by_tensor[t.stored.name]),
                    ]
                    for t in file.tensors
                },
            }
        return entries

    def _share_path(self, number: int) -> Path:
        return self._work / f"share_{number}.json"

    def _finish_if_last(self) -> bool:
        shares = [self._share_path(i) for i in range(1, self.shard[1] + 1)]
        entries: dict[str, Any] = {}
        summaries = []
        for path in shares:
            share = json.loads(path.read_text()) if path.exists() else {}
            if share.get("plan") != self.whole:  # not done yet, or left over from another job
                return False
            entries |= share["files"]
            summaries.append(share["summary"])
        if self.shard[1] > 1:
            # Several hosts may see the last share appear: one completes the folder, the others wait for the rename.
            try:
                os.close(os.open(self._work / "finishing", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except (FileExistsError, FileNotFoundError):
                if not self.resume:
                    return self._wait_for_rename()
        self.extras |= self.source.files(summaries)
        self._finish(entries)
        return True

    def _wait_for_rename(self, seconds: float = 60.0) -> bool:
        limit = time.monotonic() + seconds
        while self.partial.exists():
            if time.monotonic() > limit:
                raise ConvertError(
                    f"another host started to complete {self.partial} but did not finish; "
                    f"rerun this share with --resume"
                )
            time.sleep(0.2)
        return True

    def _finish(self, entries: dict[str, Any]) -> None:
        for name, content in self.extras.items():
            path = self.partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, path)
            else:
                path.write_bytes(content)
            sync_file(path)
        shutil.rmtree(self._work)
        folder = self.partial / self.manifest_in
        write_manifest(folder, self._manifest(entries, folder))
        for path in {p.parent for p in self.partial.rglob("*")} | {self.partial}:
            sync_folder(path)
        replaced = self.final.with_name(self.final.name + ".replaced")
        if self.final.is_dir() and any(self.final.iterdir()):
            os.rename(self.final, replaced)
        os.rename(self.partial, self.final)
        sync_folder(self.final.parent)
        if replaced.exists():
            shutil.rmtree(replaced)

    @property
    def _prefix(self) -> str:
        return "" if self.manifest_in == "." else self.manifest_in + "/"

    def _manifest(self, entries: dict[str, Any], folder: Path) -> Manifest:
        prefix, files = self._prefix, {}
        for name, entry in entries.items():
            if "ranges" in entry:
                files[name.removeprefix(prefix)] = FileEntry(
                    entry["bytes"],
                    checksum=entry["checksum"],
                    ranges=tuple(StateRange.from_json(value, entry["bytes"]) for value in entry["ranges"]),
                )
                continue
            tensors = {t: TensorEntry(tuple(s), d, c) for t, (s, d, c) in entry["tensors"].items()}
            files[name.removeprefix(prefix)] = FileEntry(entry["bytes"], tensors)
        for name in self.extras:
            if name.startswith(prefix):
                path = self.partial / name
                files[name.removeprefix(prefix)] = FileEntry(path.stat().st_size, {}, file_checksum(path))
        return Manifest(files, self.provenance)
