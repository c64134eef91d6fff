"""The preflight's own options; what else is on its command line is the configuration."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from megatron.neox_arguments import ConfigError

USAGE = """\
usage: python -m megatron.launcher.preflight CONFIG [CONFIG ...] [options] [--KEY VALUE ...]

Run on all ranks (srun, torchrun): forms the training's groups, sums over each, measures every node against the median.

  CONFIG                   the training's configuration files, merged as deepy.py merges them
  --timeout SECONDS        for each phase, after which those that did not come are named (default 180)
  --no-screen              no measurements of devices and links
  --slow-nodes fail|warn   whether slow nodes end the preflight with exit code 4 (default fail)
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
    slow_nodes: Literal["fail", "warn"]
    exclude_file: Path | None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n{USAGE}")


def parse(arguments: list[str]) -> Options:
    """Raises ConfigError."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--timeout", type=float, default=180.0)
    parser.add_argument("--screen", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--slow-nodes", choices=("fail", "warn"), default="fail")
    parser.add_argument("--exclude-file", type=Path, default=None)
    own, configuration = parser.parse_known_args(arguments)
    if own.timeout <= 0:
        raise ConfigError(f"--timeout {own.timeout}: expected seconds above 0")
    return Options(configuration, own.timeout, own.screen, own.slow_nodes, own.exclude_file)
