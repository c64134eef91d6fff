"""The groups that the training will form, and one collective with a known sum on each."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron.neox_arguments import NeoXArgs
from megatron.parallel.gpu_placement import coordinates
from megatron.preflight.diagnosis import Group, Roster
from megatron.preflight.measurements import payload_pattern, synchronize

if TYPE_CHECKING:
    from megatron.engine.mcore_groups import Links

# A payload is as large as the training's own message, but at most this: more bytes would show nothing new.
_MOST = {"cuda": 128 << 20, "cpu": 1 << 20}
_TIMED = 3  # number of collectives after the first one, which connects


def layout_sizes(args: NeoXArgs) -> tuple[int, int, int]:
    """Sizes of the layout: (pipe, data, tensor)."""
    return args.pipe_parallel_size, args.data_parallel_size, args.model_parallel_size


def layout_groups(args: NeoXArgs) -> dict[str, list[Group]]:
    """All groups of the layout by kind, named by the coordinates that their ranks share."""
    members: dict[tuple[str, str], list[int]] = {}
    for rank in range(args.global_num_gpus):
        pipe, data, tensor = coordinates(rank, *layout_sizes(args))
        for kind, where in (
            ("TP", f"(pipe {pipe}, data {data})"),
            ("PP", f"(data {data}, tensor {tensor})"),
            ("DP", f"(pipe {pipe}, tensor {tensor})"),
        ):
            members.setdefault((kind, where), []).append(rank)
    found: dict[str, list[Group]] = {"TP": [], "PP": [], "DP": [], "world": [world_group(args.global_num_gpus)]}
    for (kind, where), ranks in members.items():
        found[kind].append(Group(f"{kind} group", where, tuple(ranks)))
    return found


def world_group(world_size: int) -> Group:
    """The group of all ranks."""
    return Group("world group", "", tuple(range(world_size)))


@dataclass(frozen=True)
class TrainingGroups:
    """This rank's groups by kind, None for the world; and its links to neighboring stages, None under DeepSpeed."""

    by_kind: dict[str, dist.ProcessGroup | None]
    links: Links | None = None


def form_training_groups(args: NeoXArgs) -> TrainingGroups:
    """The groups that this rank is in, as the training forms them. Collective."""
    # Groups that follow from the layout alone need no megatron-core.
    from megatron.parallel.process_groups import form_groups

    place = form_groups(args)
    if args.engine == "megatron":
        from megatron.engine.mcore_groups import EngineGroups

        virtual = args.virtual_pipe_parallel_size > 1
        made = EngineGroups.make(place, args.shape.tied, virtual, args.distributed_timeout_minutes)
        return TrainingGroups({"TP": made.tensor, "PP": made.pipe, "DP": made.data, "world": None}, made.links)
    from megatron.core import parallel_state

    return TrainingGroups(
        {
            "TP": parallel_state.get_tensor_model_parallel_group(),
            "PP": parallel_state.get_pipeline_model_parallel_group(),
            "DP": parallel_state.get_data_parallel_group(),
            "world": None,
        }
    )


def payload_bytes(args: NeoXArgs, kind: str, device: torch.device) -> int:
    """Bytes of the training's largest message of a kind: activations in TP and PP, a stage's gradients in DP."""
    width = 4 if args.precision == "fp32" else 2
    activations = (args.train_micro_batch_size_per_gpu or 1) * args.seq_length * args.hidden_size * width
    gradients = 4 * args.trained_shape.num_parameters // (args.model_parallel_size * args.pipe_parallel_size)
    wanted = {"TP": activations, "PP": activations, "DP": gradients, "world": 1 << 20}[kind]
    return max(4096, min(wanted, _MOST[device.type]))


def check_members(group: dist.ProcessGroup | None, expected: Group) -> None:
    """Raise RuntimeError if the members of torch's group are not those of the layout."""
    ranks = tuple(dist.get_process_group_ranks(group if group is not None else dist.group.WORLD))
    if ranks != expected.ranks:
        raise RuntimeError(f"{expected.name} should be ranks {expected.ranks} and is {ranks}")


def checked_all_reduce(group: dist.ProcessGroup | None, size: int, device: torch.device) -> dict[str, Any]:
    """Sum a payload of `size` bytes over a group, and compare the result with the known sum.

    Member i of n contributes (i + 1) times a fixed pattern, so that a missing or doubled part changes the sum, which is
    n (n + 1) / 2 times the pattern. All are whole numbers, exact in fp32 up to 3,343 members.
    """
    members, own_index = dist.get_world_size(group), dist.get_rank(group)
    pattern = payload_pattern(size, device)
    expected = pattern * (members * (members + 1) // 2)
    wrong, seconds = 0, []
    for _ in range(1 + _TIMED):
        payload = pattern * (own_index + 1)
        synchronize(device)
        started = time.perf_counter()
        dist.all_reduce(payload, group=group)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
        wrong = max(wrong, int((payload != expected).sum()))
    return {"wrong": wrong, "elements": size // 4, "seconds": min(seconds[1:])}


def judge_sums(groups: list[Group], roster: Roster, outcomes: list[dict[str, Any]], size: int) -> tuple[str, list[str]]:
    """One line about all groups of a kind, and a line for each group with a wrong sum. `outcomes` is by rank."""
    wrong, speeds = [], []
    for group in groups:
        bad = [rank for rank in group.ranks if outcomes[rank]["wrong"]]
        if bad:
            most = max(outcomes[rank]["wrong"] for rank in bad)
            wrong.append(
                f"  {group.name}, {roster.several(group.ranks)}: wrong sums on rank{'s' * (len(bad) > 1)} "
                f"{', '.join(map(str, bad[:8]))}, in up to {most} of {outcomes[bad[0]]['elements']} elements"
            )
        slowest = max(outcomes[rank]["seconds"] for rank in group.ranks)
        members = len(group.ranks)
        # Bus bandwidth as nccl-tests defines it: what an ideal ring carries over each link.
        speeds.append((2 * (members - 1) / members * size / slowest / 1e9, group))
    speeds.sort(key=lambda item: item[0])
    low, middle, high = speeds[0][0], speeds[len(speeds) // 2][0], speeds[-1][0]
    members = len(groups[0].ranks)
    text = f"{groups[0].kind}{'s' * (len(groups) > 1)}: {len(groups)} of {members} rank{'s' * (members > 1)}"
    text += f", all-reduce of {size / 2**20:.2g} MiB right"
    if members > 1:
        text += f"; bus GB/s: median {middle:.3g}, min {low:.3g}, max {high:.3g}"
        if len(groups) > 1:
            text += f", slowest {speeds[0][1].where} {roster.several(speeds[0][1].ranks)}"
    return text, wrong
