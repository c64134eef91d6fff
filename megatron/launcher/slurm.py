"""deepy.py under Slurm: in an allocation it starts all ranks with one srun; started by srun, it is a rank itself."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from megatron.common.quantity import quantity
from megatron.launcher.local import rank_environment, reads_input, say_end, supervise
from megatron.neox_arguments import ConfigError, NeoXArgs
from megatron.parallel.handover import write_handover
from megatron.parallel.rank_env import in_step
from megatron.supervision.failures import recorded_code

REPEAT_WARNING_SECONDS = 10.0


def in_allocation(env: Mapping[str, str]) -> bool:
    """Whether this process runs inside a Slurm job, in its batch script or a shell, and can call srun."""
    return "SLURM_JOB_ID" in env


def uses_srun(args: NeoXArgs, env: Mapping[str, str]) -> bool:
    """Whether deepy.py starts the ranks with srun. Raises ConfigError if it should but there is no allocation."""
    if args.launcher == "slurm" and not in_allocation(env):
        raise ConfigError(
            "launcher: slurm outside a Slurm allocation; submit a job (docs/launching.md) or get one with salloc"
        )
    chosen = args.launcher == "slurm" or (args.launcher == "auto" and in_allocation(env))
    if not chosen and args.num_nodes > 1:
        raise ConfigError(
            f"num_nodes is {args.num_nodes}, but this is not a Slurm allocation, and here deepy.py starts the ranks of "
            f"one machine. Submit a job (docs/launching.md), or start the script itself by torchrun on each node"
        )
    hosts = [] if chosen else hosts_of(args.merged.get("hostfile"))
    if len(hosts) > 1:
        raise ConfigError(
            f"hostfile {args.merged['hostfile']} names {len(hosts)} machines, but this is not a Slurm allocation, and "
            f"here deepy.py starts the ranks of one machine. Submit a job (docs/launching.md), in which it itself "
            f"starts all nodes with srun, or start the script by torchrun on each node"
        )
    return chosen


def hosts_of(hostfile: str | None) -> list[str]:
    """Names in a GPT-NeoX hostfile (`name slots=8` per line); none if there is no such file."""
    if not hostfile or not Path(hostfile).is_file():
        return []
    lines = (line.split("#")[0].split() for line in Path(hostfile).read_text().splitlines())
    return [words[0] for words in lines if words]


def srun_command(args: NeoXArgs, env: Mapping[str, str]) -> list[str]:
    """The srun that starts all ranks, numbered node by node.

    It passes the whole environment, because `--export=A=b` splits values at commas. Raises ConfigError if the
    allocation and the configuration differ in their number of nodes.
    """
    nodes = int(env.get("SLURM_JOB_NUM_NODES") or env.get("SLURM_NNODES") or "1")
    if nodes != args.num_nodes:
        raise ConfigError(
            f"the allocation has {quantity(nodes, 'node')}, but the configuration is for num_nodes {args.num_nodes}; "
            f"ask Slurm for {args.num_nodes}, or give --num_nodes {nodes} (and num_gpus, the ranks on each)"
        )
    command = [
        "srun",
        f"--nodes={nodes}",
        f"--ntasks={args.global_num_gpus}",
        f"--ntasks-per-node={args.global_num_gpus // nodes}",
        "--distribution=block",
        "--kill-on-bad-exit=1",
        "--export=ALL",
    ]
    # In a shell started by srun: otherwise the new srun would wait for resources that the shell itself holds.
    if in_step(env):
        command.append("--overlap")
    if env.get("SLURM_CPUS_PER_TASK"):  # since 22.05 srun no longer inherits it from the job
        command.append(f"--cpus-per-task={env['SLURM_CPUS_PER_TASK']}")
    return command


def start_by_srun(script: Path, args: NeoXArgs) -> int:
    """Run `script` on all ranks of the allocation; returns the exit code of the rank that failed first.

    The ranks read the configuration from a file that all nodes must see: it is written to the checkpoint folder, or to
    the working directory.
    """
    if shutil.which("srun") is None:
        raise ConfigError("this is a Slurm job, but srun is not on PATH; call deepy.py outside the container")
    _ = args.shape  # ConfigError if the vocabulary size is unknown
    command = srun_command(args, os.environ)
    inside = in_step(os.environ)
    parent = Path(args.save or args.log_dir or ".")
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".neox_run_{os.environ['SLURM_JOB_ID']}_", dir=parent)).resolve()
    try:
        handover = write_handover(args, folder)
        # Slurm's warning signal would kill a rank during start-up: it is blocked until StopRequest handles it.
        python = ["env", "--block-signal=USR1", sys.executable, "-u", str(script.resolve())]
        words, env = [*command, *python, "--neox-args", str(handover)], rank_environment(args)
        for name in [name for name in env if inside and name.startswith("SLURM_CPU_BIND")]:
            del env[name]  # would bind the ranks to the cores of this shell's step, which is one task
        # On Ctrl-C srun only asks for a second one; on SIGTERM it ends the ranks. It drops a warning for ranks that it
        # has not started yet.
        code = supervise(
            words,
            env,
            with_input=reads_input(args),
            interrupt=signal.SIGTERM,
            repeat_warning=REPEAT_WARNING_SECONDS,
        )
        # srun returns the highest code of all tasks, often that of a rank that it killed after another had failed.
        code = code and (recorded_code(folder) or code)
        say_end(folder, code)
        return code
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_as_rank(script: Path, arguments: list[str]) -> NoReturn:
    """Run `script` as `__main__` in this process, with `arguments`: files and overrides, which each rank reads."""
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")
    sys.exit(0)
