"""A batch script for Slurm, from a configuration and a site's profile.

    python launch/render.py frontier --nodes 256 --account AST123 \\
        configs/llama31_70b/model.yml configs/llama31_70b/cpt.yml configs/llama31_70b/frontier.yml -o job.sh

SITE is a folder next to this file: `site.yml` (Slurm flags, limits, binding) and `environment.sh` (variables, each with
its reason). The configuration is checked here, before anything waits in a queue. docs/launching.md is the guide.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launch.sites import SITES, Site, Software, folder_of, read_site, seconds, time_limit  # noqa: E402
from megatron.common.boundary import guarded  # noqa: E402
from megatron.launcher.local import IGNORED_WARNINGS  # noqa: E402
from megatron.neox_arguments import ConfigError, NeoXArgs  # noqa: E402
from megatron.neox_arguments.load import parse_overrides, resolve_path  # noqa: E402
from megatron.preflight.run_inputs import refuse_wrong_inputs  # noqa: E402

STARTUP_SECONDS = 120
TEMPLATE = Path(__file__).resolve().parent / "job.sh"

PREFLIGHT = """\
# Every group of ranks must communicate within a time limit, every node is measured, RCCL's transport is checked.
checked=0
(all_ranks 15 -m megatron.preflight "${configuration[@]}" --exclude-file "$run/exclude") || checked=$?
case $checked in
    0) ;;
    3) again 1 "the preflight: ranks or groups failed, see above" ;;
    4) again 1 "the preflight: slow nodes, see above" ;;
    *) stop 2 "the preflight failed with code $checked, see above" ;;
esac"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="launch/render.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Keys of the configuration can be given after `--`: ... -- --train_iters 100",
        allow_abbrev=False,
    )
    p.add_argument("site", metavar="SITE", help=f"one of {', '.join(SITES)}")
    p.add_argument("configs", nargs="+", metavar="CONFIG", help="YAML files, as for deepy.py")
    p.add_argument("--nodes", type=int, required=True, help="number of nodes; must equal num_nodes")
    p.add_argument("--account", help="allocation to charge")
    p.add_argument("--time", help="wall-clock limit, HOURS:MINUTES:SECONDS (default: the site's maximum)")
    p.add_argument("--job-name", default="neox-llama", help="jobs with the same name run one at a time")
    p.add_argument("--partition", help="default: the first in the site's profile")
    p.add_argument("--qos")
    p.add_argument("--exclude", metavar="NODES", help="nodes to avoid, such as frontier[00012,04711]")
    p.add_argument(
        "--sbatch", action="append", default=[], metavar="FLAG", help="additional flag, such as --sbatch=--mem=0"
    )
    p.add_argument("--environment", metavar="ARCHIVE", help="packed software, unpacked on every node")
    p.add_argument("--container", metavar="IMAGE", help="Singularity image with the software")
    p.add_argument("--bind", action="append", default=[], metavar="SPEC", help="folder to bind into the container")
    p.add_argument("--python", help="interpreter on a shared file system, instead of packed software or a container")
    p.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable for all ranks")
    p.add_argument("--signal-seconds", type=int, default=600, help="warning before the time limit (default: 600)")
    p.add_argument("--restarts", type=int, default=2, help="restarts in a row without a new save (default: 2)")
    p.add_argument(
        "--paths-on-nodes",
        action="store_true",
        help="only the compute nodes see load, data and other paths: do not look for them here, and leave ~ and "
        "$VARIABLES in paths to the job",
    )
    p.add_argument("--no-preflight", action="store_true", help="skip the check of the machine")
    p.add_argument("-o", "--output", metavar="FILE", help="default: standard output")
    return p


def main(arguments: Sequence[str] | None = None, project: Path = ROOT, directory: Path | None = None) -> int:
    """Render; returns the exit code. `project` is the checkout whose code the job runs, `directory` where it runs
    (default: here)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    split = words.index("--") if "--" in words else len(words)
    options = parser().parse_args(words[:split])
    return guarded("render.py", lambda: _main(options, words[split + 1 :], project, directory or Path.cwd()))


def _main(options: argparse.Namespace, overrides: Sequence[str], project: Path, directory: Path) -> int:
    script = render(options, overrides, project, directory)
    if options.output is None:
        print(script, end="")
        return 0
    output = Path(options.output)
    if not output.parent.is_dir():
        raise ConfigError(f"-o {output}: there is no folder {output.parent}; make it, or give another name")
    write_private(output, script)
    print(f"wrote {options.output}; submit it by: sbatch {shlex.quote(options.output)}", file=sys.stderr)
    return 0


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, because values of `--env` may be secrets."""
    path.unlink(missing_ok=True)  # an older one keeps its mode
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def render(options: argparse.Namespace, overrides: Sequence[str], project: Path, directory: Path) -> str:
    """The script's text. Raises ConfigError for anything that the configuration or the site does not allow."""
    site = read_site(options.site)
    files = [resolve_path(name) for name in options.configs]
    on_nodes = options.paths_on_nodes
    args = NeoXArgs.from_ymls(files, parse_overrides(list(overrides)), paths_on_nodes=on_nodes)
    configuration = [*map(str, files), *_without_nodes(overrides)]
    per_node = checked_ranks_per_node(options.nodes, args, site)
    software = choose_software(options, site)
    parts = {
        "SHEBANG": f"#!{site.shell}",
        "SBATCH": "\n".join(sbatch_lines(options, site, directory)),
        "TITLE": site.title,
        "RANKS": str(args.global_num_gpus),
        "RANKS_PER_NODE": str(per_node),
        "NODES": str(options.nodes),
        "VALUES": "\n".join(value_lines(options, args, configuration, project, directory)),
        "PROFILE": f"launch/{options.site}/environment.sh",
        "ENVIRONMENT": "\n".join(environment_lines(options, args, site)),
        "NODE_DISK": site.node_disk,
        "PYTHON": software.command(str(directory)),
        "STAGE_SOFTWARE": software.staging(),
        "SRUN": "\n".join(f"        {flag} \\" for flag in site.srun),
        "CHECKS": checks_before_training(options, args, site),
    }
    text = TEMPLATE.read_text()
    names = set(re.findall(r"@([A-Z_]+)@", text))
    assert names == set(parts), names ^ set(parts)
    if not on_nodes:
        refuse_wrong_inputs(args, directory)
    return re.sub(r"@([A-Z_]+)@\n?", lambda match: _filled(match, parts), text)


def _without_nodes(overrides: Sequence[str]) -> list[str]:
    """The overrides without num_nodes, which the script takes from the job: `sbatch --nodes` may override it."""
    kept, words = [], iter(overrides)
    for word in words:
        name, equals, _ = word.partition("=")
        if name.replace("-", "_") != "__num_nodes":
            kept.append(word)
        elif not equals:
            next(words)
    return kept


def _filled(match: re.Match[str], parts: dict[str, str]) -> str:
    """The text of a part with the line break after it, or nothing for an empty part."""
    end = match[0][len(match[1]) + 2 :]
    return parts[match[1]] + end if parts[match[1]] else ""


def checked_ranks_per_node(nodes: int, args: NeoXArgs, site: Site) -> int:
    """Ranks per node. ConfigError if the configuration is for a different number of nodes or ranks."""
    if nodes != args.num_nodes:
        raise ConfigError(
            f"--nodes is {nodes}, but the configuration is for num_nodes {args.num_nodes} ({args.global_num_gpus} "
            f"ranks); give the same number, or other sizes after `--`: -- --num_nodes {nodes}"
        )
    per_node = args.global_num_gpus // nodes
    if site.ranks_per_node and per_node != site.ranks_per_node:
        raise ConfigError(
            f"the configuration puts {per_node} ranks on a node; a node of {site.title} has {site.ranks_per_node} GCDs "
            f"and is charged whole: num_gpus must be {site.ranks_per_node}"
        )
    if per_node % args.model_parallel_size:
        raise ConfigError(
            f"{per_node} ranks on a node cannot hold whole tensor-parallel groups of {args.model_parallel_size}: "
            f"num_gpus must be a multiple of model_parallel_size"
        )
    return per_node


def choose_software(options: argparse.Namespace, site: Site) -> Software:
    """The software to use: as requested, else the site's, else the interpreter that runs this program."""
    given = {name: getattr(options, name) for name in ("environment", "container", "python")}
    asked = {name: value for name, value in given.items() if value is not None}
    if asked.keys() == {"container", "python"}:  # the interpreter inside the image
        return Software(container=options.container, python=options.python, bind=options.bind)
    if len(asked) > 1:
        raise ConfigError(f"give one of {', '.join('--' + name for name in asked)}")
    if asked:
        return Software(**asked, bind=options.bind)
    chosen = site.software or Software(python=sys.executable)
    return chosen.model_copy(update={"bind": [*chosen.bind, *options.bind]})


def sbatch_lines(options: argparse.Namespace, site: Site, directory: Path) -> list[str]:
    if site.needs_account and not options.account:
        raise ConfigError(f"{site.title} charges a project: give --account")
    limit = time_limit(options.time, options.nodes, options.partition, site)
    if options.signal_seconds + STARTUP_SECONDS > seconds(limit):
        raise ConfigError(
            f"--time {limit} leaves no time to train: the warning comes --signal-seconds {options.signal_seconds} "
            f"before the limit, up to a minute earlier by Slurm's clock, and a start takes a minute or more"
        )
    partition = options.partition or site.partition
    asked = [
        ("--job-name", options.job_name),
        ("--account", options.account),
        ("--partition", partition),
        ("--qos", options.qos),
        ("--nodes", str(options.nodes)),
        ("--time", limit),
        ("--exclude", options.exclude),
        ("--chdir", str(directory)),
        ("--output", "neox-%j.log"),
    ]
    for name, value in asked:
        if value and (not value.isprintable() or "\\" in value):
            raise ConfigError(f"{name} is {value!r}: sbatch reads it from one line and interprets backslashes")
    lines = [f"#SBATCH {name}={shlex.quote(value)}" for name, value in asked if value]
    for extra in site.sbatch:
        lines += [f"# {extra.why}", f"#SBATCH {extra.flag}"]
    lines += [f"#SBATCH {flag}" for flag in options.sbatch]
    lines += [
        "# the batch shell is warned before the time limit, and passes the warning on",
        f"#SBATCH --signal=B:USR1@{options.signal_seconds}",
        "# after the loss of a node Slurm starts the job again and appends to its log. Not --no-kill: if the batch",
        "# shell's node is lost, the others would stay allocated and idle until the time limit",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "# never two jobs of this name at once: they would save into the same folder",
        "#SBATCH --dependency=singleton",
    ]
    return lines


def value_lines(
    options: argparse.Namespace, args: NeoXArgs, configuration: Sequence[str], project: Path, directory: Path
) -> list[str]:
    """Assignments at the head of the script; the shell reads back exactly what was given."""
    words = "\n".join(f"    {shlex.quote(word)}" for word in configuration)
    save = shell_path(args.save or "", options.paths_on_nodes)
    return [
        f"directory={shlex.quote(str(directory))}",
        f"project={shlex.quote(str(project))}",
        f"configuration=(\n{words}\n)",
        f"save={save} # from the configuration; relative to the directory",
        f"signal_seconds={options.signal_seconds}",
        f"max_fruitless={options.restarts} # restarts in a row without a new save",
    ]


def shell_path(path: str, on_nodes: bool) -> str:
    """A path as a shell word; `~` and `$VARIABLES` stay expandable if the job is to expand them."""
    if not on_nodes or not re.search(r"[$~]", path):
        return shlex.quote(path)
    text = re.sub(r'([\\"`])', r"\\\1", path).replace("$$", r"\$")
    return '"' + re.sub(r"^~(?=/|$)", "$HOME", text) + '"'


def environment_lines(options: argparse.Namespace, args: NeoXArgs, site: Site) -> list[str]:
    """The site's profile unchanged, then variables needed at every site, then the user's variables."""
    lines = (folder_of(options.site) / "environment.sh").read_text().rstrip("\n").split("\n")
    lines += ["", "# What deepy.py sets for the ranks that it starts."]
    lines.append("# megatron-core: tensor-parallel all-reduces start before the next matrix product.")
    lines.append("export CUDA_DEVICE_MAX_CONNECTIONS=1")
    lines.append(f"export PYTHONWARNINGS={shlex.quote(','.join(IGNORED_WARNINGS))}")
    if args.device == "cpu":
        lines += ["# DeepSpeed would use a visible GPU.", "export DS_ACCELERATOR=cpu"]
        lines.append("export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}")
    for variable in options.env:
        name, equals, value = variable.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"--env {variable}: expected NAME=VALUE")
        lines.append(f"export {name}={shlex.quote(value)}")
    return lines


def checks_before_training(options: argparse.Namespace, args: NeoXArgs, site: Site) -> str:
    """Checks before the training: the plan (only the configuration if the machine is unknown), and the preflight."""
    deepy = '(run_here deepy.py "$(here)/code/train.py" "${configuration[@]}"'
    if site.machine:
        lines = ["# Does every stage fit in memory? The plan is in the log."]
        lines += [f"{deepy} --dry-run --machine {site.machine}) ||", '    stop 2 "the plan cannot be right, see above"']
    else:
        lines = ["# The configuration files may have changed since this script was rendered."]
        lines += [f"{deepy} --print-config) >/dev/null ||", '    stop 2 "the configuration cannot be right, see above"']
    if not options.no_preflight:
        # The speed of ranks on shared CPU cores says nothing about a node.
        screen = " --no-screen" if args.device == "cpu" else ""
        lines += ["", *PREFLIGHT.replace(" --exclude-file", f"{screen} --exclude-file").splitlines()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
