"""Machine-specific settings: `launch/SITE/site.yml`, validated."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron.common.quantity import quantity
from megatron.neox_arguments import ConfigError

HERE = Path(__file__).resolve().parent
SITES = sorted(path.parent.name for path in HERE.glob("*/site.yml"))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Flag(_Strict):
    """A flag of sbatch and its reason."""

    flag: str
    why: str


class Limit(_Strict):
    """The maximum duration of a job with up to `nodes` nodes."""

    nodes: int
    hours: int


class Software(_Strict):
    """Location of Python and its packages: an archive unpacked on every node, an image, or an interpreter."""

    environment: str | None = None
    container: str | None = None
    python: str | None = None
    bind: list[str] = []

    def command(self, directory: str) -> str:
        """The shell command that runs Python with "$@" on a node; `$here` is the node's folder."""
        if self.environment:
            return '"$here/software/bin/python" -u "$@"'
        if self.container:
            bind = " ".join(f"--bind {shlex.quote(spec)}" for spec in [directory, *self.bind])
            # Images of LUMI's support team give the command that activates their Python in WITH_CONDA.
            enter = """bash -c 'eval "${WITH_CONDA:-}"; exec "$0" -u "$@"'"""
            image, python = shlex.quote(self.container), shlex.quote(self.python or "python")
            return f'singularity exec --bind "$here" {bind} \\\n        {image} {enter} {python} "$@"'
        return f'{shlex.quote(self.python or "python3")} -u "$@"'

    def staging(self) -> str:
        if self.environment:
            return f"stage software {shlex.quote(self.environment)}"
        return ""


class Site(_Strict):
    """A machine to run on.

    `time_limits` is keyed by partition, each ascending in nodes, empty if unknown; `machine` is the planner's name for
    the hardware.
    """

    title: str
    shell: str = "/bin/bash"
    needs_account: bool = False
    ranks_per_node: int | None = None
    time_limits: dict[str, list[Limit]] = {}
    sbatch: list[Flag] = []
    srun: list[str] = []
    node_disk: str
    software: Software | None = None
    machine: Literal["frontier", "lumi"] | None = None

    @property
    def partition(self) -> str | None:
        return next(iter(self.time_limits), None)


def folder_of(name: str) -> Path:
    return HERE / name


def read_site(name: str) -> Site:
    """Read a site's profile. ConfigError for an unknown site or an invalid profile."""
    path = folder_of(name) / "site.yml"
    if name not in SITES:
        raise ConfigError(f"{name}: no such site; there are {', '.join(SITES)} (docs/launching.md says how to add one)")
    try:
        return Site.model_validate(yaml.safe_load(path.read_text()))
    except (ValidationError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from None


def seconds(time: str) -> int:
    """Parse Slurm's times: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        raise ConfigError(f"--time {time}: expected HOURS:MINUTES:SECONDS")
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] is not None:
        return days * 86400 + first * 3600 + second * 60 + third
    if match[4] is not None:
        return first * 3600 + second * 60 + third
    return first * 60 + second


def time_limit(time: str | None, nodes: int, partition: str | None, site: Site) -> str:
    """The time limit of a job: as requested, or the maximum. ConfigError above the site's limit."""
    if not site.time_limits:
        if time is None:
            raise ConfigError(f"{site.title} has no known limit: give --time HOURS:MINUTES:SECONDS")
        seconds(time)
        return time
    name = partition or site.partition
    limits = site.time_limits.get(name or "")
    if limits is None:
        known = ", ".join(site.time_limits)
        raise ConfigError(f"partition {name} is not in launch's profile of {site.title}, which knows {known}")
    fitting = next((limit for limit in limits if nodes <= limit.nodes), None)
    if fitting is None:
        raise ConfigError(f"{nodes} nodes: partition {name} of {site.title} allows at most {limits[-1].nodes}")
    if time is not None and seconds(time) > fitting.hours * 3600:
        raise ConfigError(
            f"--time {time}: a job of {quantity(nodes, 'node')} may take {fitting.hours} hours in partition {name} of "
            f"{site.title}; it is requeued at its limit and continues by itself"
        )
    return time or f"{fitting.hours:02d}:00:00"
