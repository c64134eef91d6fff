"""A real Slurm on one machine: munged, slurmctld and a slurmd for each of several virtual nodes.

Daemons run in the foreground as children of the tests, with their own folder, ports and munge key. Nothing outside the
folder is read or changed, and no process outlives the tests: daemons die with their parent, and all other processes are
found by SLURM_CONF in their environment.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron.common.processes import die_with_parent
from tests.support.waiting import wait_until

DAEMONS = ("munged", "slurmctld", "slurmd")
PROGRAMS = (*DAEMONS, "sbatch", "srun", "salloc", "sbcast", "scontrol", "sinfo", "squeue", "scancel")
SEARCHED = os.pathsep.join(["/usr/sbin", "/usr/local/sbin", os.environ.get("PATH", "")])  # daemons are in sbin

CONFIGURATION = """\
ClusterName=virtual
SlurmctldHost=localhost
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits until its credentials expire.
AuthInfo=socket={folder}/munge/socket,cred_expire=30
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
{selection}
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=5
KillWait=12
InactiveLimit=0
# Virtual nodes have as many cores as configured.
SlurmdParameters=config_overrides
NodeName={nodes} NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{node_ports}] {hardware} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


# Partitions and GPUs of a site. Separate, because Slurm 22.05 miscounts GPUs when such jobs are requeued, and nodes
# stay allocated ("dealloc of node n2 bad node_offset").
WITH_GPUS = """\
PartitionName=batch Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=EXCLUSIVE
PartitionName=standard-g Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=EXCLUSIVE
GresTypes=gpu
"""


def missing() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCHED) is None]


def free_ports(count: int) -> int:
    """The first of `count` consecutive free ports."""
    for first in range(36000, 60000, count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise OSError("no free ports")


class Cluster:
    """A cluster of nodes n0, n1, ..., started by `with`. With `gpus`, they look like Frontier's and LUMI's to Slurm."""

    def __init__(self, nodes: int, gpus: bool = False) -> None:
        self.gpus = gpus
        self.names = [f"n{number}" for number in range(nodes)]
        self.folder = Path(tempfile.mkdtemp(prefix="slurm_"))
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.env = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SEARCHED}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        self.folder.chmod(0o755)  # munged requires its socket to be accessible to all users
        for name in ("munge", "state", *(f"spool/{node}" for node in self.names)):
            (self.folder / name).mkdir(parents=True)
        munge = self.folder / "munge"
        munge.chmod(0o755)
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        first = free_ports(len(self.names) + 1)
        for number in range(8 if self.gpus else 0):  # Slurm checks that a GPU's device exists, not what it is
            (self.folder / f"gpu{number}").touch()
        gpus = f"Name=gpu File={self.folder}/gpu[0-7]\n" if self.gpus else ""
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\n{gpus}")
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                folder=self.folder,
                user=pwd.getpwuid(os.getuid()).pw_name,
                controller_port=first,
                nodes=f"n[0-{len(self.names) - 1}]",
                node_ports=f"{first + 1}-{first + len(self.names)}",
                selection="SelectType=" + ("select/cons_tres" if self.gpus else "select/linear"),
                hardware="CPUs=64 Gres=gpu:8 Feature=nvme" if self.gpus else "CPUs=8",
            )
            + (WITH_GPUS if self.gpus else "")
        )
        options = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._daemon("munged", "-F", *(f"--{option}={munge / name}" for option, name in options.items()))
        self.until(lambda: (munge / "socket").exists(), "munged", 20)
        self._daemon("slurmctld", "-D")
        for name in self.names:
            self.start_node(name)
        self.until(
            lambda: self.run("sinfo", "-h", "-o", "%T %D").split() == ["idle", str(len(self.names))], "nodes", 60
        )

    def wait_for_nodes(self) -> None:
        ready = ["idle", str(len(self.names))]
        self.until(lambda: self.run("sinfo", "-h", "-o", "%T %D").split() == ready, "all nodes to be idle", 60)

    def start_node(self, name: str) -> None:
        self._daemon("slurmd", "-D", "-N", name, key=name, NEOX_VIRTUAL_NODE=name)

    def _daemon(self, program: str, *arguments: str, key: str | None = None, **variables: str) -> None:
        path = shutil.which(program, path=SEARCHED)
        assert path is not None, program
        name = key or program
        with (self.folder / f"{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                [path, *arguments],
                env=self.env | variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=functools.partial(die_with_parent, os.getpid(), signal.SIGKILL),
            )

    def __exit__(self, *_: object) -> None:
        for daemon in self.daemons.values():
            daemon.kill()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            left = self.processes()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not left and all(daemon.poll() is not None for daemon in self.daemons.values()):
                break
            time.sleep(0.05)
        shutil.rmtree(self.folder, ignore_errors=True)

    def processes(self, *variables: str) -> list[int]:
        """Live processes of this cluster, daemons included, whose environment has all of these variables."""
        marks = [f"SLURM_CONF={self.env['SLURM_CONF']}".encode(), *map(str.encode, variables)]
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                entries = (path / "environ").read_bytes().split(b"\0")
                state = (path / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and all(mark in entries for mark in marks):
                    found.append(int(path.name))
        return found

    def process_table(self, job: str) -> list[tuple[int, int, str]]:
        """(process id, parent process id, command name) of every live process of a job."""
        table = []
        for pid in self.processes(f"SLURM_JOB_ID={job}"):
            with contextlib.suppress(OSError):
                name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(") ")
                table.append((pid, int(rest.split()[1]), name))
        return table

    def run(self, *command: str, check: bool = True, timeout: float = 60, **variables: str) -> str:
        """Run a Slurm command; returns its output."""
        result = subprocess.run(
            command, env=self.env | variables, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )
        if check and result.returncode:
            raise AssertionError(f"{command}: {result.returncode}\n{result.stdout}{result.stderr}")
        return result.stdout

    def succeeds(self, *command: str) -> bool:
        return subprocess.run(command, env=self.env, capture_output=True, timeout=60).returncode == 0

    def submit(self, script: Path, *options: str, **variables: str) -> str:
        """Submit a script; returns the job id. `variables` are in the environment of sbatch."""
        return self.run(
            "sbatch",
            "--parsable",
            *options,
            str(script),
            **variables,
        ).strip()

    def state(self, job: str) -> str:
        """The job's state, such as PENDING, RUNNING, COMPLETED, FAILED."""
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        words = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def start_requeued(self, job: str, times: int = 1, timeout: float = 60) -> None:
        """Wait until a job that was requeued for the `times`-th time runs again, or has ended.

        Slurm holds a requeued job until its credential expires (cred_expire). A test can shorten this, but not below
        the second in which the last start ended, until which a node treats the credential as revoked.
        """
        due: float | None = None
        update = ("scontrol", "update", f"JobId={job}", "StartTime=now+2seconds")

        def started() -> bool:
            nonlocal due
            state, restarts = self.state(job), int(self.field(job, "Restarts"))
            if restarts != times or state not in ("PENDING", "COMPLETING", "CONFIGURING"):
                return restarts >= times
            # While nodes clean up, the last start's script may still run, and Slurm would discard the start time. It
            # may do so even a moment later: then the time is set again.
            cleaning = self.run("sinfo", "--noheader", "--states=completing", "--format=%N").strip()
            overdue = due is None or time.monotonic() > due
            if state == "PENDING" and not cleaning and overdue and self.succeeds(*update):
                due = time.monotonic() + 4
            return False

        self.until(started, f"job {job} back in the queue", timeout)

    def wait_for(self, job: str, *states: str, timeout: float = 120) -> str:
        self.until(lambda: self.state(job) in states, f"job {job} to be {' or '.join(states)}", timeout)
        return self.state(job)

    def fail_node(self, name: str, notice: bool = False) -> None:
        """Kill everything on a node at once: daemon, steps and ranks.

        Slurm notices after half a minute; with `notice` the failure is reported at once, as by a site's health check.
        """
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()
        for variable in (f"NEOX_VIRTUAL_NODE={name}", f"SLURMD_NODENAME={name}"):
            for pid in self.processes(variable):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if notice:
            self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=Not responding")

    def until(self, condition: Callable[[], bool], what: str, timeout: float) -> None:
        wait_until(condition, what, timeout, output=self.logs, every=0.1)

    def logs(self, names: Sequence[str] = ("munged", "slurmctld", "n0")) -> str:
        texts = []
        for name in names:
            path = self.folder / f"{name}.log"
            texts.append(f"--- {name}\n{path.read_text(errors='replace')[-1500:] if path.exists() else ''}")
        return "\n".join(texts)
