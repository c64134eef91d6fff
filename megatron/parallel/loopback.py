"""Keeps the traffic of ranks that are all on one machine on its loopback interface."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from datetime import timedelta

from torch.distributed import TCPStore

from megatron.parallel.rank_env import StartedRank, expand_hosts

LOOPBACK = "127.0.0.1"


def serve_on_loopback(port: int = 0, timeout: timedelta = timedelta(seconds=300)) -> TCPStore:
    """Start a store that only this machine can reach; torch's default listens on all interfaces. OSError if the port
    is in use."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((LOOPBACK, port))
    listener.listen(socket.SOMAXCONN)
    taken = listener.getsockname()[1]
    # The store owns the descriptor from here on.
    return TCPStore(
        LOOPBACK, taken, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def on_one_node(started: StartedRank, env: Mapping[str, str]) -> bool:
    """Whether the launcher's variables say that all ranks are on this node.

    False under torchrun's agent, which serves the rendezvous itself.
    """
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return False
    if env.get("MASTER_ADDR") in (LOOPBACK, "localhost"):
        return True
    hosts = env.get("SLURM_STEP_NODELIST", "")
    if hosts and started.source == "SLURM_PROCID":
        return len(expand_hosts(hosts)) == 1
    return started.local_world_size == started.world_size


def rendezvous_on_loopback(started: StartedRank, env: Mapping[str, str], timeout: timedelta) -> TCPStore:
    """The rendezvous store of ranks on one machine, at MASTER_PORT; rank 0 serves it."""
    port = int(env["MASTER_PORT"])
    if started.rank == 0:
        return serve_on_loopback(port, timeout)
    return TCPStore(LOOPBACK, port, is_master=False, timeout=timeout, wait_for_workers=False)


def talk_over_loopback() -> None:
    """Have gloo connect ranks over the loopback interface, unless the environment sets another one."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
