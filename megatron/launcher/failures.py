"""Who failed first: a file in the run's folder, so that one rank speaks and its victims are silent.

A rank that fails writes it before it ends, and its peers notice only afterwards that it is gone.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

USER_ERROR, FAILURE = 2, 1  # exit codes
LOST_PEER_SECONDS = 2.0  # how long a rank that lost a peer waits for the peer's own words

_FAILED = "failed"


def claim(folder: Path | None, name: str, text: str = "") -> bool:
    """Whether this process is the first of the run to say `name`. Without a folder of the run every process is."""
    if folder is None:
        return True
    draft = folder / f"{name}.{os.getpid()}"
    try:
        draft.write_text(text)
        os.link(draft, folder / name)  # fails if it exists, and nobody sees it half-written
    except FileExistsError:
        return False
    except OSError:  # the folder is gone: better said twice than not at all
        return True
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()
    return True


def claim_failure(folder: Path | None, code: int) -> bool:
    """Whether no rank has failed before this one; `code` becomes the exit code of those that fail in its wake."""
    return claim(folder, _FAILED, str(code))


def code_of_the_culprit(folder: Path | None) -> int | None:
    """Exit code of the rank that failed first; waits a little for one that is about to say so."""
    deadline = time.monotonic() + LOST_PEER_SECONDS
    while folder is not None and folder.exists() and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            return int((folder / _FAILED).read_text())
        time.sleep(0.05)
    return None


_LOST_PEER = ("closed by peer", "reset by peer", "Connection refused", "Broken pipe", "aborted", "imed out")


def is_about_a_lost_peer(error: Exception) -> bool:
    """Whether an exception is what gloo, NCCL or the store raise when another rank has gone."""
    return isinstance(error, RuntimeError | OSError) and any(sign in str(error) for sign in _LOST_PEER)
