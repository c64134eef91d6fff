"""Traces of torch's profiler, of steps given in the YAML or requested by a file while the job runs.

`log_dir/profile.request` may be empty (two steps, rank 0) or say more:

    steps: 3
    ranks: [0, 5]

Rank 0 looks for it between steps, all ranks learn of it through `step_sync`; traced steps begin with the next one.
Traces are Chrome's, for chrome://tracing or ui.perfetto.dev.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from megatron.common.log import EVERY_RANK
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.collective_errors import RankGroup
from megatron.parallel.place import Place

logger = logging.getLogger(__name__)

REQUEST, REFUSED, FOLDER = "profile.request", "profile.request.refused", "profile"
LOOK_SECONDS = 1.0  # checking a parallel file system has a cost
MOST_STEPS = 100  # a trace holds every operation: gigabytes


@dataclass(frozen=True)
class ProfileRequest:
    """Trace iterations `first` to `end` - 1 on `ranks`."""

    first: int
    end: int
    ranks: tuple[int, ...]


class RequestError(ValueError):
    """A request that cannot be honored."""


def parse_request(text: str, iteration: int, world_size: int) -> ProfileRequest:
    """The request that a file holds, for steps from `iteration` on. Raises RequestError."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RequestError(f"not YAML: {' '.join(str(error).split())}") from None
    content = {} if content is None else content
    if not isinstance(content, dict) or set(content) - {"steps", "ranks"}:
        raise RequestError(f"{text.strip()[:80]!r} is not a mapping of steps and ranks")
    steps, ranks = content.get("steps", 2), content.get("ranks", [0])
    if type(steps) is not int or not 1 <= steps <= MOST_STEPS:
        raise RequestError(f"steps is {steps!r}, expected a number from 1 to {MOST_STEPS}")
    if not isinstance(ranks, list) or not ranks or any(type(r) is not int or not 0 <= r < world_size for r in ranks):
        raise RequestError(f"ranks is {ranks!r}, expected a list of ranks from 0 to {world_size - 1}")
    return ProfileRequest(iteration, iteration + steps, tuple(ranks))


class Profiler:
    """The profiler of this rank."""

    def __init__(self, args: NeoXArgs, place: Place) -> None:
        self.place = place
        self.folder = Path(args.log_dir) if args.log_dir else None
        self.request: ProfileRequest | None = None
        if args.profile:
            self.request = ProfileRequest(args.profile_step_start, args.profile_step_stop, tuple(args.profile_ranks))
        self._profile: Any = None
        self._looked = 0.0

    def wanted(self) -> bool:
        """Whether there is a request; on rank 0 only."""
        if self.place.rank != 0 or self.folder is None or self._profile is not None:
            return False
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return False
        self._looked = time.monotonic()
        return (self.folder / REQUEST).exists()

    def take(self, iteration: int) -> None:
        """Take over the request for the steps from `iteration` on. Collective."""
        request = RankGroup.world(self.place.device).broadcast(self._read(iteration) if self.place.rank == 0 else None)
        if request is not None:
            self._stop()
            self.request = request
            steps, ranks = f"{request.first} to {request.end - 1}", list(request.ranks)
            logger.info(f"profile: iterations {steps} on ranks {ranks}, as requested")

    def _read(self, iteration: int) -> ProfileRequest | None:
        assert self.folder is not None
        path = self.folder / REQUEST
        try:
            request = parse_request(path.read_text(), iteration, self.place.world_size)
        except (OSError, UnicodeDecodeError, RequestError) as error:
            logger.warning(f"{path}: {error}; the run continues without a profile, the file is now {REFUSED}")
            with contextlib.suppress(OSError):
                path.replace(self.folder / REFUSED)
            return None
        with contextlib.suppress(OSError):
            path.unlink()
        return request

    @contextlib.contextmanager
    def step(self, iteration: int) -> Iterator[None]:
        """A training step that may be in a trace."""
        request = self.request
        if request and self._profile is None and request.first <= iteration < request.end:
            self._start(request)
        yield
        if request and iteration >= request.end - 1:
            self._stop()

    def close(self) -> None:
        """The run ends: write the unfinished trace."""
        self._stop()

    def _start(self, request: ProfileRequest) -> None:
        if self.place.rank not in request.ranks:
            return
        activities = [ProfilerActivity.CPU]
        if self.place.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.start()

    def _stop(self) -> None:
        """End the trace and write it to a temporary file, which is renamed. A failed write is reported and does not end
        the run."""
        request, self.request = self.request, None
        running, self._profile = self._profile, None
        if running is None or request is None or self.folder is None:
            return
        running.stop()
        name = f"iterations_{request.first}-{request.end - 1}_rank_{self.place.rank}.json"
        path = self.folder / FOLDER / name
        draft = path.with_name(f".{name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(draft))
            os.replace(draft, path)
        except (OSError, RuntimeError) as error:
            logger.warning(f"rank {self.place.rank} could not write {path}: {error}", extra=EVERY_RANK)
            with contextlib.suppress(OSError):
                draft.unlink()
            return
        logger.info(f"profile: {path}")


@contextlib.contextmanager
def named(phase: str) -> Iterator[None]:
    """`phase` as a span in the trace, if one is being recorded."""
    if not torch.autograd._profiler_enabled():
        yield
        return
    with torch.profiler.record_function(phase):
        yield
