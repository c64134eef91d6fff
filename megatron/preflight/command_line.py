"""The preflight's command line: what is asked for, and who asks."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from megatron.neox_arguments import ConfigError
from megatron.parallel.rank_env import find_ranks, planned_nodes, set_rendezvous
from megatron.preflight.diagnosis import CONFIGURATION, Roster
from megatron.preflight.phase_store import Board
from megatron.preflight.phases import Preflight

USAGE = """\
usage: python -m megatron.preflight CONFIG [CONFIG ...] [options] [--KEY VALUE ...]

Run on all ranks (srun, torchrun): forms the training's groups, sums over each, measures every node against the median.

  CONFIG                   the training's configuration files, merged as deepy.py merges them
  --timeout SECONDS        for each phase, after which those that did not come are named (default 180)
  --no-screen              no measurements of devices and links
  --slow-nodes fail|warn   whether slow nodes end the preflight with exit code 4 (default: fail on GPUs, warn on CPUs)
  --exclude-file FILE      where slow nodes are written, as in --exclude=nid001,nid002; empty if there are none
  --KEY VALUE              sets any key of the configuration, as for deepy.py

Exit code, the same on all ranks: 0 all is well, 2 the configuration or the placement cannot be right, 3 ranks or groups
that do not come, do not end or sum wrongly, 4 slow nodes, 5 RCCL on TCP sockets.
"""


@dataclass(frozen=True)
class Options:
    configuration: list[str]  # files and overrides, as `worker_args` takes them
    timeout: float
    screen: bool
    slow_nodes: Literal["fail", "warn"] | None  # None: as the device is
    exclude_file: Path | None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n{USAGE}")


def parse(arguments: list[str]) -> Options:
    """Raises ConfigError."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--timeout", type=float, default=180.0)
    parser.add_argument("--screen", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--slow-nodes", choices=("fail", "warn"), default=None)
    parser.add_argument("--exclude-file", type=Path, default=None)
    own, configuration = parser.parse_known_args(arguments)
    if own.timeout <= 0:
        raise ConfigError(f"--timeout {own.timeout}: expected seconds above 0")
    return Options(configuration, own.timeout, own.screen, own.slow_nodes, own.exclude_file)


def main(arguments: list[str]) -> int:
    """0, 4 for slow nodes, 2 for a wrong command line; what fails later ends all ranks from inside."""
    if not arguments or any(word in ("-h", "--help") for word in arguments):
        print(USAGE, end="")
        return 0 if arguments else CONFIGURATION
    try:
        options = parse(arguments)
        started = find_ranks(os.environ)
        if started is None:
            raise ConfigError("nobody started this process as a rank; start the preflight by srun or torchrun")
        set_rendezvous(os.environ)
        roster = Roster(started.world_size, started.local_world_size, planned_nodes(os.environ))
    except ConfigError as error:
        print(f"preflight: {error}", file=sys.stderr)
        return CONFIGURATION
    # The board ends the process with a sentence; NCCL's own watchdog would abort it with a page of addresses.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    board = Board(started, os.environ, roster, options.timeout)
    Preflight(started, board, options.configuration).run(options.screen, options.slow_nodes, options.exclude_file)
    return 0
