"""One run at a time writes into a save folder: a file in it names the owner. Standard library only.

The file is created by `link`, which fails if the name exists, on Lustre as elsewhere, and needs no flock. It holds
host, boot, process and Slurm job of rank 0. A killed run does not block the next start if its end is known: the same
Slurm job takes over (it was requeued), and so does any run if the owner's process is dead on this host or Slurm says
that its job has ended. Otherwise the owner is alive, or nobody here can tell, and the run stops and names it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from megatron.common.errors import CheckpointError, UserError

OWNER = "owner.json"
SLURM_SECONDS = 20  # how long squeue may take
_ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}


class FolderTakenError(UserError):
    """Another run writes into the folder, or may do so."""


@dataclass(frozen=True)
class Owner:
    """The writing process, rank 0's. `machine` tells hosts, boots and containers apart, `began` reused pids."""

    host: str
    machine: str
    pid: int
    began: str  # the kernel's start time of the process
    job: str | None  # Slurm's
    since: str
    token: str

    @classmethod
    def this_process(cls, env: Mapping[str, str] | None = None) -> Self:
        job = (os.environ if env is None else env).get("SLURM_JOB_ID")
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        pid = os.getpid()
        return cls(socket.gethostname(), _machine(), pid, _began(pid) or "", job, since, secrets.token_hex(8))

    @classmethod
    def from_json(cls, text: str) -> Self | None:
        """Parse what `to_json` writes; None for anything else."""
        try:
            body: Any = json.loads(text)
            found = cls(**body)
        except (ValueError, TypeError):
            return None
        texts = (found.host, found.machine, found.began, found.since, found.token)
        whole = all(isinstance(value, str) for value in texts) and isinstance(found.pid, int)
        return found if whole and isinstance(found.job, str | None) else None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


def _machine() -> str:
    """Host, boot and process namespace: where all are equal, equal process ids mean the same process."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot} {namespace}"


def _began(pid: int) -> str | None:
    """Start time of a process in the kernel's ticks; None if there is no such process, or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


_held: dict[Path, FolderOwner] = {}  # of this process, by resolved folder


@contextlib.contextmanager
def owning(folder: Path) -> Iterator[str | None]:
    """Own a save folder while the body runs; yields what `FolderOwner.acquire` returns. On rank 0 only."""
    claim = FolderOwner(folder)
    line = claim.acquire()
    _held[folder.resolve()] = claim
    try:
        yield line
    finally:
        _held.pop(folder.resolve(), None)
        claim.release()


def check_ownership(folder: Path) -> None:
    """CheckpointError if this process owned the folder and another run has taken it since."""
    claim = _held.get(folder.resolve())
    if claim is not None:
        claim.check()


class FolderOwner:
    """This run's claim on a save folder: `acquire`, `check` before each save, `release`. On rank 0 only."""

    def __init__(self, folder: Path, owner: Owner | None = None) -> None:
        self.folder, self.path = folder, folder / OWNER
        self.owner = owner or Owner.this_process()

    def acquire(self) -> str | None:
        """Become the owner; returns a line about a claim that was taken over, None if there was none.

        FolderTakenError if another run has the folder, OSError if it cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for _ in range(20):  # others may take over at the same time
            if self._link(self.path):
                return None
            text, holder = self._read(self.path)
            if text is None:
                continue
            self._refuse_living(holder, self.path)
            if self._take_over(text):
                why = f"{holder}: {ended(holder, self.owner)}" if holder else "it could not be read"
                return f"{self.path} of another start is taken over ({why})"
        raise FolderTakenError(f"save: {self.path} keeps changing: several runs start in {self.folder} at once")

    def problems(self) -> list[str]:
        """Why this process could not become the owner, without becoming it."""
        _, holder = self._read(self.path)
        try:
            self._refuse_living(holder, self.path)
        except FolderTakenError as error:
            return [str(error)]
        return []

    def _refuse_living(self, holder: Owner | None, claim: Path) -> None:
        if holder is not None and ended(holder, self.owner) is None:
            raise FolderTakenError(
                f"save: {self.folder} belongs to another run: {holder}. Two runs in one folder would replace each "
                f"other's checkpoints: wait until it ends, or give another folder with --save NEW. If you know that it "
                f"has ended, remove {claim}"
            )

    def _take_over(self, judged: str) -> bool:
        """Replace the claim with text `judged`; False if it has changed, or another run is taking over.

        Only the holder of `owner.json.next` replaces a claim, after reading it once more.
        """
        right = self.path.with_name(f"{OWNER}.next")
        if not self._link(right):
            _, taker = self._read(right)
            self._refuse_living(taker, right)
            right.unlink(missing_ok=True)  # killed while it took over
            return False
        try:
            if self._read(self.path)[0] != judged:
                return False
            draft = self._draft()
            os.replace(draft, self.path)
            return True
        finally:
            right.unlink(missing_ok=True)

    def check(self) -> None:
        """CheckpointError if another run has taken the folder since."""
        _, holder = self._read(self.path)
        if holder is None or holder.token != self.owner.token:
            by = f"{holder} has taken it" if holder else f"{self.path} is gone"
            raise CheckpointError(
                f"{self.folder} is no longer this run's: {by}. Nothing is written; continue the run in another folder "
                f"with --save"
            )

    def release(self) -> None:
        """Give the folder back, if it is still this run's."""
        with contextlib.suppress(OSError):
            _, holder = self._read(self.path)
            if holder is not None and holder.token == self.owner.token:
                self.path.unlink()

    def _draft(self) -> Path:
        draft = self.path.with_name(f"{OWNER}.{self.owner.token}")
        draft.write_text(self.owner.to_json())
        return draft

    def _link(self, name: Path) -> bool:
        draft = self._draft()
        try:
            os.link(draft, name)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    @staticmethod
    def _read(path: Path) -> tuple[str | None, Owner | None]:
        try:
            text = path.read_text(errors="replace")
        except FileNotFoundError:
            return None, None
        return text, Owner.from_json(text)


def ended(holder: Owner, own: Owner) -> str | None:
    """Why `holder` no longer writes; None if it does, or if nobody here can tell."""
    if holder.machine == own.machine:
        if _began(holder.pid) == holder.began:
            return None
        return "this process has ended"
    if holder.job is None:
        return None
    if holder.job == own.job:
        return "the same job, started again"
    state = _slurm_state(holder.job)
    return f"Slurm says that its job is {state}" if state in _ENDED else None


def _slurm_state(job: str) -> str | None:
    """A job's state according to Slurm; COMPLETED if Slurm no longer knows it, None if Slurm cannot be asked."""
    command = ["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=SLURM_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    if result.returncode != 0:
        return "COMPLETED" if "Invalid job id" in result.stderr else None
    states = result.stdout.split()
    return states[0] if states else "COMPLETED"
