"""The preflight's command line."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from megatron.neox_arguments import ConfigError
from megatron.parallel.rank_env import find_started_rank, planned_nodes, set_rendezvous
from megatron.preflight.diagnosis import CONFIGURATION, Roster
from megatron.preflight.phase_store import PhaseStore
from megatron.preflight.phases import Preflight

USAGE = """\
usage: python -m megatron.preflight CONFIG [CONFIG ...] [options] [--KEY VALUE ...]

Run it on all ranks (srun, torchrun). It forms the training's groups, sums over each, and compares every node with the
median.

  CONFIG                   the training's configuration files, merged as by deepy.py
  --timeout SECONDS        for each phase, after which ranks that did not arrive are named (default 180)
  --no-inputs              do not check that checkpoint, data, tokenizer and disk space exist
  --no-screen              do not measure devices and links
  --slow-nodes fail|warn   whether slow nodes end the preflight with exit code 4 (default: fail on GPUs, warn on CPUs)
  --exclude-file FILE      write the slow nodes to FILE, as in nid001,nid002; empty if there are none
  --KEY VALUE              set any key of the configuration, as for deepy.py

Exit code, the same on all ranks: 0 all is well, 2 the configuration or the placement cannot be right, 3 ranks or groups
do not start, do not finish or compute a wrong sum, 4 slow nodes, 5 RCCL uses TCP sockets.
"""


@dataclass(frozen=True)
class PreflightOptions:
    """The parsed command line."""

    configuration: list[str]  # files and overrides, as `rank_args` takes them
    timeout: float  # seconds, for each phase
    screen: bool
    inputs: bool
    slow_nodes: Literal["fail", "warn"] | None  # None: the default of the device
    exclude_file: Path | None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n{USAGE}")


def parse_options(arguments: list[str]) -> PreflightOptions:
    """Split the arguments into options and the configuration. Raises ConfigError."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--timeout", type=float, default=180.0)
    parser.add_argument("--screen", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--inputs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--slow-nodes", choices=("fail", "warn"), default=None)
    parser.add_argument("--exclude-file", type=Path, default=None)
    known, configuration = parser.parse_known_args(arguments)
    if known.timeout <= 0:
        raise ConfigError(f"--timeout {known.timeout}: expected seconds above 0")
    return PreflightOptions(
        configuration, known.timeout, known.screen, known.inputs, known.slow_nodes, known.exclude_file
    )


def main(arguments: list[str]) -> int:
    """Run the preflight; returns 0 if all is well, 2 for a wrong command line. Later failures end the process in
    `PhaseStore`."""
    if not arguments or any(word in ("-h", "--help") for word in arguments):
        print(USAGE, end="")
        return 0 if arguments else CONFIGURATION
    try:
        options = parse_options(arguments)
        started = find_started_rank(os.environ)
        if started is None:
            raise ConfigError("this process was not started as a rank; start the preflight by srun or torchrun")
        set_rendezvous(os.environ)
        roster = Roster(started.world_size, started.local_world_size, planned_nodes(os.environ))
    except ConfigError as error:
        print(f"preflight: {error}", file=sys.stderr)
        return CONFIGURATION
    # The phase store ends the process with one message; NCCL's own watchdog would abort it with a long stack trace.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    store = PhaseStore(started, os.environ, roster, options.timeout)
    Preflight(started, store, options.configuration, options.inputs).run(
        options.screen, options.slow_nodes, options.exclude_file
    )
    return 0
