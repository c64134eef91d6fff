"""The rank's side of the start: its configuration, and an end that can be read."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron.launcher.processes import die_with_parent
from megatron.neox_arguments import ConfigError, NeoXArgs
from megatron.neox_arguments.derived import Task
from megatron.neox_arguments.errors import UserError
from megatron.neox_arguments.load import parse_overrides

USER_ERROR, FAILURE = 2, 1
FAILED = "failed"  # this file in the run's folder says that some rank has failed and has said why
LOST_PEER_SECONDS = 2.0  # how long a rank that lost a peer waits for the peer's own words


def worker_args(arguments: list[str] | None = None, task: Task = "train") -> NeoXArgs:
    """The configuration of this rank: `--neox-args FILE` as deepy.py writes it, or YAML files and overrides.

    The second form is for ranks that somebody else has started (`torchrun train.py a.yml b.yml`); then every rank
    resolves the files, and `distributed.initialize` compares the results. Raises ConfigError.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["--neox-args"] and len(words) == 2:
        return read_handover(Path(words[1]))
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    if first == 0:
        raise ConfigError(
            f"configuration files are missing: python deepy.py {Path(sys.argv[0]).name} model.yml run.yml"
        )
    return NeoXArgs.from_ymls(words[:first], parse_overrides(words[first:]), task=task)


def read_handover(path: Path) -> NeoXArgs:
    """Read what `start.write_handover` wrote; a file that is not the one that was written stops."""
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: the configuration handed over cannot be read ({error.strerror})") from None
    expected = path.stem.partition("-")[2]
    found = hashlib.sha256(text.encode()).hexdigest()
    if found != expected:
        raise ConfigError(
            f"{path}: the configuration handed over has digest {found[:12]}, its name says {expected[:12]}: the file "
            f"was changed or not read whole; start again"
        )
    return NeoXArgs.from_json(text)


def run(program: Callable[[NeoXArgs], object], task: Task = "train", user_errors: tuple = ()) -> NoReturn:
    """`program(worker_args())`, and the end of the process.

    Exit code 0, 2 for a user's error (UserError or one of `user_errors`: its text alone is printed, once, however many
    ranks meet it), 1 for anything else: then the first rank to fail prints its traceback, and those that fail because
    it is gone are silent.
    """
    if _run_folder():
        die_with_parent(os.getppid(), signal.SIGKILL)
    code = FAILURE
    try:
        program(worker_args(task=task))
        code = 0
    except (UserError, *user_errors) as error:
        code = USER_ERROR
        _claim(FAILED)
        if _claim("said-" + hashlib.sha256(str(error).encode()).hexdigest()):
            print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception as error:
        rank, lost_peer = os.environ.get("RANK", "0"), _is_about_a_lost_peer(error)
        if lost_peer:
            _wait_for_the_culprit()
        if _claim(FAILED):
            print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr)
        elif not lost_peer:
            print(f"rank {rank} failed as well: {type(error).__name__}: {error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # Destructors of process groups can wait for peers that wait for this rank: leave without them.
        os._exit(code)
    _close_process_group()
    sys.exit(0)


def _claim(name: str) -> bool:
    """Whether this rank is the first of the run to say `name`; without a folder of the run each rank is."""
    folder = _run_folder()
    if folder is None:
        return True
    try:
        os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:  # the folder is gone: say it rather than lose it
        return True
    return True


def _run_folder() -> Path | None:
    """The folder of the file that deepy.py handed over."""
    return Path(sys.argv[2]).parent if sys.argv[1:2] == ["--neox-args"] else None


def _wait_for_the_culprit() -> None:
    folder, deadline = _run_folder(), time.monotonic() + LOST_PEER_SECONDS
    while folder and folder.exists() and not (folder / FAILED).exists() and time.monotonic() < deadline:
        time.sleep(0.05)


_LOST_PEER = ("closed by peer", "reset by peer", "Connection refused", "Broken pipe", "aborted", "imed out")


def _is_about_a_lost_peer(error: Exception) -> bool:
    return isinstance(error, RuntimeError | OSError) and any(sign in str(error) for sign in _LOST_PEER)


def _close_process_group() -> None:
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
