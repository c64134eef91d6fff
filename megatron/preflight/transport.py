"""Which network RCCL (or NCCL) actually uses, from its own log: without its plugin it silently falls back to TCP.

The patterns match NCCL 2.4 to 2.28, RCCL and aws-ofi-nccl as they appear in public logs. A good log contains "Loaded
net plugin AWS Libfabric" (HPE's documentation) and "NET/OFI Selected Provider is cxi" (LUMI's).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.preflight.diagnosis import Roster

_NETWORK = re.compile(r"Using network (.+?)\s*$|Assigned NET plugin (.+?) to comm", re.MULTILINE)
_PROVIDER = re.compile(r"NET/OFI Selected [Pp]rovider is ([^\s,]+)")
_CHANNEL = re.compile(r"via NET/([^/\n]+)/[^\s/]+(/GDRDMA)?")
_SOCKET = re.compile(r"NET/Socket ?: Using")
_PLUGIN = re.compile(r"(NET/Plugin ?:.*(?:[Nn]o plugin found|Could not find|Plugin load|cannot open|Failed to).*)")
_SOCKET_PROVIDERS = ("tcp", "sockets", "udp", "net")  # libfabric's providers over TCP and UDP; also `tcp;ofi_rxm`

ADVICE = (
    "RCCL would run at a fraction of the network's speed. Load the site's plugin after rocm (Frontier: module load "
    "rccl-net-plugin; LUMI: module load aws-ofi-rccl, or a container that has it), so that librccl-net.so is on "
    'LD_LIBRARY_PATH, and export NCCL_NET="AWS Libfabric", with which RCCL stops if it is missing'
)


@dataclass(frozen=True)
class Transport:
    """What one rank's log says. `network` is NCCL's name for it ("AWS Libfabric", "IB", "Socket"), None if unsaid."""

    network: str | None
    provider: str | None  # libfabric's, where a plugin uses it: "cxi" is Slingshot
    direct: bool | None  # the network reads GPU memory itself; None if no channel over the network is in the log
    complaint: str  # the line about a plugin that was not found

    @property
    def network_and_provider(self) -> str:
        """`AWS Libfabric, provider cxi`."""
        return f"{self.network}, provider {self.provider}" if self.provider else str(self.network)


def start_rccl_log(env: MutableMapping[str, str]) -> Path:
    """Have RCCL write its log to a file of this process, before its first call; returns the file."""
    path = Path(tempfile.mkdtemp(prefix="neox_preflight_")) / "rccl.log"  # a folder that is this user's alone
    env.update(NCCL_DEBUG="INFO", NCCL_DEBUG_SUBSYS="INIT,NET,ENV", NCCL_DEBUG_FILE=str(path))
    return path


def take_rccl_log(path: Path) -> str:
    """The log so far. The file and its folder are removed; RCCL keeps writing to it."""
    try:
        text = path.read_text(errors="replace")
        path.unlink()
        path.parent.rmdir()
    except OSError:
        return ""
    return text


def parse_rccl_log(log: str) -> Transport:
    """Parse a log. What the channels use takes precedence over announcements, since several plugins can announce
    themselves."""
    channels = _CHANNEL.findall(log)
    networks = [first or second for first, second in _NETWORK.findall(log)]
    network: str | None = networks[-1] if networks else None
    if channels:
        names = [name for name, _ in channels]
        network = "Socket" if "Socket" in names else names[-1]
    elif network is None and _SOCKET.search(log):
        network = "Socket"
    provider = _PROVIDER.search(log)
    complaint = _PLUGIN.search(log)
    return Transport(
        network,
        provider[1] if provider else None,
        all(direct for _, direct in channels) if channels else None,
        complaint[1].strip() if complaint else "",
    )


def transport_problem(found: Transport) -> str | None:
    """Why a run on several nodes should not start with this transport, None if it may."""
    if found.network is None:
        return "RCCL's log does not say which network is used"
    if found.network == "Socket":
        return "TCP sockets" + (f" ({found.complaint})" if found.complaint else "")
    if found.provider and found.provider.partition(";")[0] in _SOCKET_PROVIDERS:
        return f"libfabric's provider {found.provider}, which is TCP"
    return None


def transport_failure(found: Sequence[Transport], roster: Roster) -> str | None:
    """Which ranks must not start with their transport, and what to do; None if all may. `found` is by rank."""
    by_problem: dict[str, list[int]] = {}
    for rank, transport in enumerate(found):
        text = transport_problem(transport)
        if text:
            by_problem.setdefault(text, []).append(rank)
    if not by_problem:
        return None
    lines = [f"  {roster.several(ranks)}: {text}" for text, ranks in by_problem.items()]
    return "\n".join(["preflight: FAILED at the transport check, RCCL does not use the fast network", *lines, ADVICE])


def transport_summary(found: Sequence[Transport]) -> str:
    """One line about all ranks if none of them has a problem."""
    kinds = sorted({each.network_and_provider for each in found})
    text = f"transport: {' and '.join(kinds)} on all {len(found)} ranks"
    indirect = sum(each.direct is False for each in found)
    if indirect:
        text += f"; {indirect} send through host memory, GPU-direct RDMA is off (NCCL_NET_GDR_LEVEL=PHB turns it on)"
    return text
