"""Passes the configuration to the ranks: in a file that deepy.py writes, or on their command line."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from megatron.common.errors import ConfigError
from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.load import parse_overrides
from megatron.neox_arguments.registry import Task
from megatron.parallel.rank_env import find_started_rank


def write_handover(args: NeoXArgs, folder: Path) -> Path:
    """Write the configuration to a file named after its digest, with which a rank verifies what it has read."""
    path = folder / f"neox_args-{args.digest}.json"
    path.write_text(args.to_json())
    return path


def read_handover(path: Path) -> NeoXArgs:
    """Read what `write_handover` wrote. Raises ConfigError if the file cannot be read or its content has changed."""
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: the configuration of this run cannot be read ({error.strerror})") from None
    expected = path.stem.partition("-")[2]
    found = hashlib.sha256(text.encode()).hexdigest()
    if found != expected:
        raise ConfigError(
            f"{path}: the configuration of this run has digest {found[:12]}, its name says {expected[:12]}: the file "
            f"was changed or only partly read; start the run again"
        )
    return NeoXArgs.from_json(text)


def rank_args(arguments: list[str] | None = None, task: Task = "train") -> NeoXArgs:
    """This rank's configuration, from `arguments` (default: those of the process).

    Either `--neox-args FILE`, as deepy.py starts ranks, or YAML files and overrides, for ranks that srun or torchrun
    started (`srun python train.py a.yml b.yml`): then every rank resolves the files, and `process_groups.initialize`
    compares the results. Raises ConfigError.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["--neox-args"] and len(words) == 2:
        return read_handover(Path(words[1]))
    first_option = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    if first_option == 0:
        raise ConfigError(
            f"configuration files are missing: python deepy.py {Path(sys.argv[0]).name} model.yml run.yml"
        )
    started = find_started_rank(os.environ)
    world_size = None if started is None else started.world_size
    return NeoXArgs.from_ymls(words[:first_option], parse_overrides(words[first_option:]), world_size, task=task)
