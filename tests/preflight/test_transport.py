"""The network used by RCCL, according to its log."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.parallel.gpu_placement import Seat
from megatron.preflight.diagnosis import Roster
from megatron.preflight.transport import (
    parse_rccl_log,
    start_rccl_log,
    take_rccl_log,
    transport_failure,
    transport_problem,
    transport_summary,
)
from tests.support import rccl_logs

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("log", "network", "provider", "direct"),
    [
        (rccl_logs.PLUGIN, "AWS Libfabric", "cxi", True),
        (rccl_logs.NEWER, "AWS Libfabric", "cxi", False),
        (rccl_logs.SOCKETS, "Socket", None, False),
        (rccl_logs.TCP_PROVIDER, "AWS Libfabric", "tcp;ofi_rxm", None),
        (rccl_logs.INFINIBAND, "IB", None, True),
        (rccl_logs.OLD_SOCKETS, "Socket", None, None),
        (rccl_logs.ANNOUNCED_ONLY, "Socket", None, False),
        (rccl_logs.ONE_NODE, None, None, None),
        ("", None, None, None),
    ],
)
def test_transport_is_read_from_the_log(
    log: str, network: str | None, provider: str | None, direct: bool | None
) -> None:
    found = parse_rccl_log(log)
    assert (found.network, found.provider, found.direct) == (network, provider, direct)


@pytest.mark.parametrize("log", [rccl_logs.PLUGIN, rccl_logs.NEWER, rccl_logs.INFINIBAND])
def test_fast_networks_pass(log: str) -> None:
    assert transport_problem(parse_rccl_log(log)) is None


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (rccl_logs.SOCKETS, "TCP sockets (NET/Plugin : No plugin found (librccl-net.so)"),
        (rccl_logs.OLD_SOCKETS, "TCP sockets"),
        (rccl_logs.ANNOUNCED_ONLY, "TCP sockets"),
        (rccl_logs.TCP_PROVIDER, "libfabric's provider tcp;ofi_rxm, which is TCP"),
        (rccl_logs.ONE_NODE, "does not say which network"),
        ("", "does not say which network"),
    ],
)
def test_other_networks_fail(log: str, said: str) -> None:
    text = transport_problem(parse_rccl_log(log))
    assert text is not None
    assert said in text


def roster(nodes: list[str]) -> Roster:
    made = Roster(len(nodes))
    made.seats.update({rank: Seat(rank, node, 0, 0, rank, 0) for rank, node in enumerate(nodes)})
    return made


def test_one_node_without_the_plugin_is_named() -> None:
    found = [parse_rccl_log(rccl_logs.SOCKETS if rank in (2, 3) else rccl_logs.PLUGIN) for rank in range(6)]
    text = transport_failure(found, roster(["n0", "n0", "n1", "n1", "n2", "n2"]))
    assert text is not None
    assert "ranks 2-3 on n1: TCP sockets" in text
    assert "n0" not in text
    assert "rccl-net-plugin" in text


def test_all_with_the_plugin_are_one_line() -> None:
    found = [parse_rccl_log(rccl_logs.PLUGIN)] * 3
    assert transport_failure(found, roster(["n0", "n1", "n2"])) is None
    assert transport_summary(found) == "transport: AWS Libfabric, provider cxi on all 3 ranks"
    assert "1 send through host memory" in transport_summary([*found, parse_rccl_log(rccl_logs.NEWER)])


def test_the_log_is_a_file_of_this_process_and_is_removed() -> None:
    env = {"NCCL_DEBUG": "WARN"}
    path = start_rccl_log(env)
    assert env["NCCL_DEBUG"] == "INFO"
    assert env["NCCL_DEBUG_FILE"] == str(path)
    path.write_text("a line\n")
    assert take_rccl_log(path) == "a line\n"
    assert not Path(path).exists()
    assert take_rccl_log(path) == ""
