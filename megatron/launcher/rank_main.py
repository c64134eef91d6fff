"""The rank's side of the start: its configuration, and an end that can be read."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron.common.errors import UserError
from megatron.common.processes import die_with_parent
from megatron.neox_arguments import ConfigError, NeoXArgs
from megatron.neox_arguments.load import parse_overrides
from megatron.neox_arguments.registry import Task
from megatron.parallel.rank_env import find_ranks, node_name
from megatron.supervision.failures import (
    FAILURE,
    LOST,
    USER_ERROR,
    LostRanks,
    Stopped,
    claim,
    claim_failure,
    claim_loss,
    code_after,
    code_of_the_culprit,
    is_about_a_lost_peer,
    run_folder,
)

AFTER_THE_CULPRIT_SECONDS = 0.5  # a victim ends later than the culprit, so that the launcher names the right one


def worker_args(arguments: list[str] | None = None, task: Task = "train") -> NeoXArgs:
    """The configuration of this rank: `--neox-args FILE` as deepy.py writes it, or YAML files and overrides.

    The second form is for ranks that somebody else has started (`srun python train.py a.yml b.yml`); then every rank
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
    ranks = find_ranks(os.environ)
    world_size = None if ranks is None else ranks.world_size
    return NeoXArgs.from_ymls(words[:first], parse_overrides(words[first:]), world_size, task=task)


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


def run(program: Callable[[NeoXArgs], object], task: Task = "train") -> NoReturn:
    """`program(worker_args())`, and the end of the process.

    Exit codes: 0; 2 for a UserError, its text alone printed once, however many ranks meet it; the one of `Stopped`
    for a run that ends early in order; 76 (LOST) where other ranks died or hang; 1 for anything else. Then the first
    rank to fail prints its traceback, and those that fail because it is gone are silent.
    """
    code, folder = FAILURE, run_folder(sys.argv[1:])
    if sys.argv[1:2] == ["--neox-args"]:
        die_with_parent(os.getppid(), signal.SIGKILL)
    try:
        program(worker_args(task=task))
        code = 0
    except UserError as error:
        code = USER_ERROR
        claim_failure(folder, code, f"error: {error}")
        if claim(folder, "said-" + hashlib.sha256(str(error).encode()).hexdigest()):
            print(f"error: {error}", file=sys.stderr)
    except Stopped as stop:
        code = stop.code
        if claim_failure(folder, code, str(stop)) and (folder is not None or _rank() == 0):
            print(f"stopped: {stop}", file=sys.stderr)
        _close_process_group()  # all ranks are here: none has failed
    except LostRanks as lost:
        if claim_loss(folder, lost):
            code = LOST
            print(f"stopped: {lost}", file=sys.stderr)
        else:
            code = code_after(folder)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception as error:
        code = _unexpected(error, folder)
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # Destructors of process groups can wait for peers that wait for this rank: leave without them.
        os._exit(code)
    _close_process_group()
    sys.exit(0)


def _unexpected(error: Exception, folder: Path | None) -> int:
    """Report an error that nobody foresaw, unless it only follows from another rank's; returns the exit code."""
    rank, happened = _rank(), "failed"
    if is_about_a_lost_peer(error):
        culprit = code_of_the_culprit(folder)
        if culprit is not None:
            time.sleep(AFTER_THE_CULPRIT_SECONDS)
            return culprit
        happened = "lost another rank, which left no word"
    what = f"rank {rank} on {node_name(os.environ)} {happened}: {type(error).__name__}: {error}"
    if claim_failure(folder, FAILURE, what):
        print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr)
    else:
        print(f"rank {rank} failed as well: {type(error).__name__}: {error}", file=sys.stderr)
    return FAILURE


def _rank() -> int:
    with contextlib.suppress(ConfigError):  # contradicting variables: said already
        ranks = find_ranks(os.environ)
        return 0 if ranks is None else ranks.rank
    return 0


def _close_process_group() -> None:
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
