"""The preflight's phases in order. All ranks run them together; rank 0 evaluates the results and prints."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.engine.operations import how_documents_are_attended_to
from megatron.neox_arguments import ConfigError
from megatron.neox_arguments.registry import as_one_message
from megatron.parallel.cpu_binding import Cpus, check_cpus, far_from_gpu, own_cpus
from megatron.parallel.gpu_placement import Seat
from megatron.parallel.handover import rank_args
from megatron.parallel.process_groups import (
    check_seats,
    find_seat,
    print_seats,
    started_ranks,
    take_device,
)
from megatron.parallel.rank_env import StartedRank
from megatron.preflight import gemm_library, groups, report, software, stage_links, transport
from megatron.preflight.compare import Screen
from megatron.preflight.diagnosis import CONFIGURATION, SLOW, SOCKETS, STALLED, Group
from megatron.preflight.phase_store import SECRET, PhaseStore
from megatron.preflight.run_inputs import input_problems
from megatron.preflight.run_screens import Screening
from megatron.preflight.transport import Transport

UNSEALED = (
    "note: messages between nodes are not sealed, so that anyone on the network can disturb this preflight; to seal "
    f"them: export {SECRET}=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n') before srun"
)


class Preflight:
    """The phases on one rank. `configuration` holds files and overrides, as `rank_args` takes them."""

    def __init__(self, started: StartedRank, store: PhaseStore, configuration: list[str], inputs: bool = True) -> None:
        self.started, self.store, self.configuration, self.inputs = started, store, configuration, inputs
        self.prints = started.rank == 0
        self.begun = time.monotonic()

    def run(self, screen: bool, slow_nodes: str | None, exclude_file: Path | None) -> None:
        """Run all phases. Returns if all is well; otherwise the phase store ends the process."""
        self.take_seats()
        self.form_groups()
        screening = Screening(self.store, self.started.rank, self.device)
        between = screening.meet()
        for kind in ("TP", "PP", "DP", "world"):
            self.sum_over(kind)
        self.check_transport()
        self.exchange_between_stages()
        if screen:
            self.time_gemm_libraries()
            screened = screening.run(between)
            if self.prints:
                self.judge(screened, slow_nodes, exclude_file)
        self.store.finish()
        if self.prints:
            print(f"preflight: all is well, after {time.monotonic() - self.begun:.0f} s", flush=True)

    # --- ranks and groups

    def take_seats(self) -> None:
        """Every rank reads the configuration and takes its device; rank 0 compares."""
        reports = self.store.phase("the start", [], self._seat)
        if self.prints:
            self.store.publish("nodes", [seat["node"] for seat, *_ in reports])
            self._check_seats(reports)

    def _seat(self) -> Any:
        self.args = rank_args(self.configuration)
        started_ranks(self.args)
        self.store.roster.sizes = groups.layout_sizes(self.args)
        self.groups = groups.layout_groups(self.args)
        self.device = take_device(self.args, self.started)
        seat, numa = find_seat(self.args, self.started, self.device)
        installed = software.installed_software()
        if self.args.isolate_documents:
            installed["isolated documents"] = how_documents_are_attended_to(self.args, self.device)
        return asdict(seat), numa, asdict(own_cpus()), installed, self.args.digest

    def _check_seats(self, reports: list[Any]) -> None:
        seats = [(Seat(**seat), numa) for seat, numa, *_ in reports]
        cpus = {rank: Cpus(**bound) for rank, (_, _, bound, *_) in enumerate(reports)}
        installed = [found for *_, found, _ in reports]
        self.store.roster.seats.update({seat.rank: seat for seat, _ in seats})
        digests = {digest: self.store.roster.named(rank) for rank, (*_, digest) in enumerate(reports)}
        if len(digests) > 1:
            one, other, *_ = digests.values()
            self.store.fail(CONFIGURATION, f"preflight: {one} and {other} hold different configurations")
        print(software.software_line(installed[0]), flush=True)
        if self.store.open_to_others:
            print(UNSEALED, flush=True)
        different = software.different_software(installed, self.store.roster)
        if different:
            self.store.fail(CONFIGURATION, "\n".join(["preflight: ranks have different software", *different]))
        problems = input_problems(self.args) if self.inputs else []
        if problems:
            self.store.fail(CONFIGURATION, f"preflight: {as_one_message(problems)}")
        try:
            check_seats([seat for seat, _ in seats])
            check_cpus([seat for seat, _ in seats], cpus)
        except ConfigError as error:
            self.store.fail(CONFIGURATION, f"preflight: {error}")
        print_seats(self.args, seats)
        far = far_from_gpu([seat for seat, _ in seats], {seat.rank: domain for seat, domain in seats}, cpus)
        if far:
            print(
                f"note: {len(far)} ranks run on CPUs far from their GPU (another NUMA domain), the first is "
                f"{self.store.roster.named(far[0].rank)}: bind them (docs/launching.md)"
            )

    def form_groups(self) -> None:
        """The world and the training's groups, formed as by `process_groups.initialize`."""
        world = self.groups["world"]
        self.store.phase("the forming of the world group", world, self._join)
        self.store.phase("the forming of the TP, PP and DP groups", world, self._form)

    def _join(self) -> None:
        self.rccl_log = transport.start_rccl_log(os.environ) if self.args.distributed_backend == "nccl" else None
        dist.init_process_group(
            self.args.distributed_backend,
            store=dist.PrefixStore("world", self.store.torch_store),
            rank=self.started.rank,
            world_size=self.started.world_size,
            timeout=timedelta(seconds=2 * self.store.timeout + 60),  # so that the phase store times out first
            device_id=self.device if self.device.type == "cuda" else None,
        )

    def _form(self) -> None:
        self.training_groups = groups.form_training_groups(self.args)

    def sum_over(self, kind: str) -> None:
        """One known sum over every group of a kind, in all groups at once."""
        size = groups.payload_bytes(self.args, kind, self.device)

        def work() -> dict[str, Any]:
            group = self.training_groups.by_kind[kind]
            expected = next(of_kind for of_kind in self.groups[kind] if self.started.rank in of_kind.ranks)
            groups.check_members(group, expected)
            return groups.checked_all_reduce(group, size, self.device)

        outcomes = self.store.phase(f"the {kind} collectives", self.groups[kind], work)
        if self.prints:
            text, wrong = groups.judge_sums(self.groups[kind], self.store.roster, outcomes, size)
            if wrong:
                self.store.fail(STALLED, "\n".join([f"preflight: FAILED at the {kind} collectives", *wrong]))
            print(text, flush=True)

    def exchange_between_stages(self) -> None:
        """The pipeline's messages between all pairs of neighboring stages, and the memory of a two-rank
        communicator."""
        rounds = stage_links.stage_rounds(self.args)
        if not rounds:
            return
        rank, size = self.started.rank, stage_links.stage_message_bytes(self.args)
        links, rates = self.training_groups.links, {}
        for number, pairs in enumerate(rounds):
            own = next((pair for pair in pairs if rank in pair), None)
            work = _rest if own is None else partial(stage_links.stage_link_rate, own, rank, size, self.device, links)
            name = f"messages between stages, round {number + 1} of {len(rounds)}"
            found = self.store.phase(name, [Group("stage link", "", pair) for pair in pairs], work)
            if found:
                rates.update({pair: min(found[pair[0]], found[pair[1]]) for pair in pairs})
        count = partial(stage_links.pair_communicator_bytes, rank, self.started.world_size, size, self.device)
        taken = self.store.phase("a communicator of two ranks", self.groups["world"], count)
        if self.prints:
            lines = stage_links.stage_link_lines(rates, size, self.store.roster, self.device, links is not None)
            own_links = sum(link is not None for link in vars(links).values()) if links else len(rounds)
            print("\n".join([*lines, stage_links.communicator_line(taken, own_links)]), flush=True)

    def time_gemm_libraries(self) -> None:
        """Print which library multiplies the configured model's matrices faster, where there are two."""
        if self.device.type == "cpu" or torch.version.hip is None:
            if self.prints:
                print(gemm_library.NOTHING_TO_CHOOSE[self.device.type], flush=True)
            return
        work = partial(gemm_library.time_libraries, self.args, self.device)
        timed = self.store.phase("the GEMM libraries", [], work)
        if self.prints:
            print("\n".join(gemm_library.choice_lines(self.args, timed)), flush=True)

    def check_transport(self) -> None:
        """Fail if any rank of a run on several nodes reaches the network by TCP."""
        transports = self.store.phase("the transport check", [], self.read_transport)
        if not self.prints:
            return
        nodes = {seat.node for seat in self.store.roster.seats.values()}
        if transports[0] is None:
            print("transport: gloo over TCP sockets, by choice (distributed_backend)", flush=True)
        elif len(nodes) == 1:
            print("transport: one node, no network is used", flush=True)
        else:
            found = [Transport(**fields) for fields in transports]
            failed = transport.transport_failure(found, self.store.roster)
            if failed:
                self.store.fail(SOCKETS, failed)
            print(transport.transport_summary(found), flush=True)

    def read_transport(self) -> dict[str, Any] | None:
        """This rank's `Transport` as a dictionary, None without RCCL."""
        if self.rccl_log is None:
            return None
        return asdict(transport.parse_rccl_log(transport.take_rccl_log(self.rccl_log)))

    def judge(self, screened: list[Screen], slow_nodes: str | None, exclude_file: Path | None) -> None:
        """On rank 0: print the results of the screens, write the list for --exclude, and fail on slow nodes if so
        configured."""
        nodes = list(dict.fromkeys(self.store.roster.nodes()))
        print("\n".join(report.overview(screened)), flush=True)
        rows = report.by_node(screened, report.worst_first(screened, nodes))
        print("\n".join(rows[: report.NODES_SHOWN + 1]), flush=True)
        if len(rows) > report.NODES_SHOWN + 1 and self.args.log_dir:
            path = Path(self.args.log_dir) / "preflight.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(rows) + "\n")
            print(f"all {len(nodes)} nodes are in {path}", flush=True)
        for screen in screened:
            for link in screen.slow_links:
                print(f"slow link between nodes that are not slow with others: {link}", flush=True)
        slow = report.slow_nodes(screened, nodes)
        if exclude_file:
            exclude_file.parent.mkdir(parents=True, exist_ok=True)
            exclude_file.write_text(",".join(slow) + "\n" * bool(slow))
        if slow:
            text = [f"slow node {node}: {reason}" for node, reason in slow.items()]
            text.append(
                f"preflight: {len(slow)} of {len(nodes)} nodes are slow; leave them out: --exclude={','.join(slow)}"
            )
            # CPUs are shared: their current speed says little about the next hours.
            if slow_nodes == "fail" or (slow_nodes is None and self.device.type == "cuda"):
                self.store.fail(SLOW, "\n".join(text))
            print("\n".join(text), flush=True)


def _rest() -> None:
    """A turn in which this rank only waits for the others."""
