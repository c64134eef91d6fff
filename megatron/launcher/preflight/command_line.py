"""The preflight's phases, in order, and its command line."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron.launcher.distributed import check_seats, find_seat, form_groups, print_seats, started_ranks, take_device
from megatron.launcher.placement import Seat
from megatron.launcher.preflight import groups as checks
from megatron.launcher.preflight.board import Board
from megatron.launcher.preflight.options import USAGE, Options, parse
from megatron.launcher.preflight.verdict import CONFIGURATION, STALLED, Roster
from megatron.launcher.ranks import Ranks, find_ranks, planned_nodes, set_rendezvous
from megatron.launcher.worker import worker_args
from megatron.neox_arguments import ConfigError


def main(arguments: list[str]) -> int:
    """0, or 2 for a wrong command line; what fails later ends all ranks from inside (docs/preflight.md)."""
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
    Preflight(options, started, Board(started, os.environ, roster, options.timeout)).run()
    return 0


class Preflight:
    """One rank's way through the phases."""

    def __init__(self, options: Options, started: Ranks, board: Board) -> None:
        self.options, self.started, self.board = options, started, board
        self.begun = time.monotonic()

    @property
    def speaks(self) -> bool:
        return self.started.rank == 0

    def run(self) -> None:
        """All phases; returns if all is well."""
        self._take_seats()
        self._form_groups()
        for kind in ("TP", "PP", "DP", "world"):
            self._sum_over(kind)
        self.board.finish()
        if self.speaks:
            print(f"preflight: all is well, after {time.monotonic() - self.begun:.0f} s", flush=True)

    def _take_seats(self) -> None:
        """Every rank reads the configuration and takes its device; rank 0 compares."""
        told = self.board.phase("the start", [], self._seat)
        if not self.speaks:
            return
        seats = [(Seat(**seat), numa) for seat, numa, _ in told]
        self.board.roster.seats.update({seat.rank: seat for seat, _ in seats})
        digests = {digest: self.board.roster.named(rank) for rank, (_, _, digest) in enumerate(told)}
        if len(digests) > 1:
            one, other, *_ = digests.values()
            self.board.fail(CONFIGURATION, f"preflight: {one} and {other} hold different configurations")
        try:
            check_seats([seat for seat, _ in seats])
        except ConfigError as error:
            self.board.fail(CONFIGURATION, f"preflight: {error}")
        print_seats(self.args, seats)

    def _seat(self) -> Any:
        self.args = worker_args(self.options.configuration)
        started_ranks(self.args)
        self.board.roster.sizes = checks.sizes(self.args)
        self.device = take_device(self.args, self.started)
        self.groups = checks.groups_of(self.args)
        seat, numa = find_seat(self.args, self.started, self.device)
        return asdict(seat), numa, self.args.digest

    def _form_groups(self) -> None:
        world = self.groups["world"]
        self.board.phase("the forming of the world group", world, self._join)
        self.board.phase("the forming of the TP, PP and DP groups", world, lambda: form_groups(self.args) and None)

    def _join(self) -> None:
        """As `distributed.initialize` does, but by the board's store and with a time limit that the board outruns."""
        dist.init_process_group(
            self.args.distributed_backend,
            store=dist.PrefixStore("world", self.board.store),
            rank=self.started.rank,
            world_size=self.started.world_size,
            timeout=timedelta(seconds=2 * self.options.timeout + 60),
            device_id=self.device if self.device.type == "cuda" else None,
        )

    def _sum_over(self, kind: str) -> None:
        size = checks.payload_bytes(self.args, kind, self.device)

        def work() -> dict[str, Any]:
            group = checks.process_group(kind)
            mine = next(group for group in self.groups[kind] if self.started.rank in group.ranks)
            checks.check_members(group, mine)
            return checks.all_reduce(group, size, self.device)

        outcomes = self.board.phase(f"the {kind} collectives", self.groups[kind], work)
        if self.speaks:
            text, wrong = checks.judge(self.groups[kind], self.board.roster, outcomes, size)
            if wrong:
                self.board.fail(STALLED, "\n".join([f"preflight: FAILED at the {kind} collectives", *wrong]))
            print(text, flush=True)
