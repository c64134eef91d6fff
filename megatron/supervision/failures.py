"""Which rank failed first, and why: files in the run's folder, so that only the first failure is reported.

A rank that fails writes them before it ends, so before its peers can notice that it is gone. The batch script prints
`why` last.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

# Exit codes. REQUEUE is sysexits.h's EX_TEMPFAIL: the checkpoint is saved, and the same command resumes from it. LOST:
# ranks died or hung; the same command resumes from the last checkpoint, preferably without their nodes (LOST_NODES
# names them, one per line).
FAILURE, USER_ERROR, REQUEUE, LOST = 1, 2, 75, 76
LOST_PEER_SECONDS = 2.0  # how long a rank that lost a peer waits for the peer's own report

_FAILED, WHY, LOST_NODES = "failed", "why", "lost-nodes"


class Stopped(Exception):
    """The run ends early, in an orderly way on all ranks. The text says why, `code` is the exit code."""

    def __init__(self, why: str, code: int = REQUEUE) -> None:
        super().__init__(why)
        self.code = code


class LostRanks(Exception):
    """Ranks died, or did not arrive where the others wait. The message names them and their nodes.

    `first` is True on the one rank that reports it.
    """

    def __init__(self, why: str, nodes: list[str], first: bool = True) -> None:
        super().__init__(why)
        self.nodes, self.first = nodes, first


def claim_loss(folder: Path | None, lost: LostRanks) -> bool:
    """`claim_failure` for lost ranks; also writes their nodes, for the batch script that requeues the job."""
    first = claim_failure(folder, LOST, str(lost))
    if first and folder is not None:
        claim(folder, LOST_NODES, "".join(f"{node}\n" for node in lost.nodes))
    return first and (folder is not None or lost.first)


def run_folder(arguments: list[str]) -> Path | None:
    """The folder that the ranks of a run share: NEOX_RUN_FOLDER, or that of the configuration file from deepy.py."""
    if "NEOX_RUN_FOLDER" in os.environ:
        return Path(os.environ["NEOX_RUN_FOLDER"])
    return Path(arguments[1]).parent if arguments[:1] == ["--neox-args"] else None


def claim(folder: Path | None, name: str, text: str = "") -> bool:
    """Write the file `name` unless the run has it; returns whether this process was first (True without a folder)."""
    if folder is None:
        return True
    draft = folder / f"{name}.{os.getpid()}"
    try:
        draft.write_text(text)
        os.link(draft, folder / name)  # fails if it exists, and no process can read it half-written
    except FileExistsError:
        return False
    except OSError:  # the folder is gone: reporting twice is better than not at all
        return True
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()
    return True


def claim_failure(folder: Path | None, code: int, why: str = "") -> bool:
    """Record a failure; returns whether it is the first. `code` is the exit code of ranks that fail because of it."""
    first = claim(folder, _FAILED, str(code))
    if first and why and folder is not None:
        claim(folder, WHY, why + "\n")
    return first


def clear(folder: Path) -> None:
    """Remove the files of an earlier start: a requeued job has the same folder."""
    for pattern in (_FAILED, WHY, LOST_NODES, "said-*"):
        for path in folder.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def recorded_code(folder: Path) -> int | None:
    """Exit code of the rank that failed or stopped first, None if none has."""
    try:
        return int((folder / _FAILED).read_text())
    except (FileNotFoundError, ValueError):
        return None


def recorded_reason(folder: Path) -> str | None:
    """The message of the rank that failed or stopped first; None if it left none."""
    with contextlib.suppress(OSError):
        return (folder / WHY).read_text(errors="replace").strip() or None
    return None


def reported_by_launcher(arguments: list[str]) -> bool:
    """Whether deepy.py has started this rank, and itself reports the first failure as the last line of the run."""
    return arguments[:1] == ["--neox-args"]


def code_after(folder: Path | None) -> int:
    """Exit code of a rank that finds ranks lost after a failure was reported: that of the failed rank, else LOST."""
    recorded = None if folder is None else recorded_code(folder)
    return LOST if recorded is None else recorded


def code_of_first_failure(folder: Path | None) -> int | None:
    """Exit code of the rank that failed first, None if none has; waits LOST_PEER_SECONDS for a rank about to write
    it."""
    deadline = time.monotonic() + LOST_PEER_SECONDS
    while folder is not None and folder.exists() and time.monotonic() < deadline:
        code = recorded_code(folder)
        if code is not None:
            return code
        time.sleep(0.05)
    return None


_LOST_PEER = ("closed by peer", "reset by peer", "Connection refused", "Broken pipe", "aborted", "imed out")


def is_about_a_lost_peer(error: Exception) -> bool:
    """Whether gloo, NCCL or the store raise this exception when another rank is gone."""
    return isinstance(error, RuntimeError | OSError) and any(sign in str(error) for sign in _LOST_PEER)
