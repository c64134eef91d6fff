"""The command line of deepy.py."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron.common.boundary import guarded
from megatron.launcher.local import start_local
from megatron.launcher.slurm import run_as_rank, start_by_srun, uses_srun
from megatron.neox_arguments import ConfigError, NeoXArgs
from megatron.neox_arguments.load import parse_overrides, resolve_path
from megatron.neox_arguments.registry import Task
from megatron.parallel.rank_env import started_as_rank
from megatron.preflight.run_inputs import refuse_wrong_inputs

if TYPE_CHECKING:
    from megatron.planner.front.options import PlanOptions

USAGE = """\
usage: python deepy.py SCRIPT CONFIG [CONFIG ...] [-d FOLDER] [--KEY VALUE ...] [--print-config] [--dry-run] [--help]

Checks the configuration, then starts SCRIPT (train, eval, generate, mcq or embed, with or without .py) on all ranks:
those of this machine or, in a Slurm allocation, all ranks of the job by one srun. If it was started as a rank itself
(srun python deepy.py ...), it runs SCRIPT.

  CONFIG            YAML files, merged; `.yml` may be omitted; a key must not be in two files
  -d, --conf_dir    folder that is prepended to every CONFIG
  -i, -o FILE       sample_input_file and sample_output_file
  -H FILE           hostfile, as in GPT-NeoX; in a Slurm allocation all its nodes are started anyway
  --KEY VALUE       set any key after merging: --train_iters 10 --optimizer.params.lr 1e-5 --from_scratch
  --print-config    print the merged and derived configuration and what DeepSpeed gets, and start nothing
  --paths-on-nodes  only the compute nodes see what the run reads and writes: do not look for it here, and leave ~ and
                    $VARIABLES in paths to them
  --dry-run         print the plan of a training: memory of every stage, time, checkpoint size; then check that all that
                    it reads exists and fits. Starts nothing and needs no GPU. Exit code 2 if something cannot be right.
                    With it:
      --json            as JSON
      --machine NAME    frontier (default) or lumi
      --usable-gib X    usable memory of a GCD, default the machine's
      --allow-memory    do not fail if the plan exceeds memory
      --token-budget N  days and node-hours for N tokens
      --search          rank all layouts of the same number of ranks and global batch
      --picture FILE    the pipeline's schedule and the memory of the stages as .png or .svg
  --help            print this text

Keys: docs/configuration.md. The exit code is the job's; 2 means that the configuration cannot be right.
"""

_SHORT = {"-i": "--sample_input_file", "-o": "--sample_output_file", "-H": "--hostfile"}
# GPT-NeoX's options of one value, which may precede the files. `--eval_tasks` takes several and must follow them.
_BEFORE_FILES = (
    *("-H", "--hostfile", "-i", "--sample_input_file", "-o", "--sample_output_file", "--wandb_group"),
    *("--wandb_run_name", "--wandb_team", "--iteration", "--eval_results_prefix", "--autotuning"),
)
_TASKS: dict[str, Task] = {"eval.py": "eval", "generate.py": "generate", "mcq.py": "mcq", "embed.py": "embed"}


@dataclass
class Invocation:
    """What deepy.py was asked to do."""

    script: Path
    configs: list[Path]
    overrides: dict[str, Any] = field(default_factory=dict)
    options: list[str] = field(default_factory=list)  # the overrides, as typed
    print_config: bool = False
    plan: PlanOptions | None = None  # --dry-run
    paths_on_nodes: bool = False

    @property
    def task(self) -> Task:
        """Which keys the script needs; an unknown script is treated as a training."""
        return _TASKS.get(self.script.name, "train")


def parse_command_line(arguments: list[str]) -> Invocation:
    """Split deepy's arguments; raises ConfigError."""
    words = list(arguments)
    folder = _take(words, ("-d", "--conf_dir", "--conf-dir"))
    print_config = _take_flag(words, ("--print-config", "--print_config"))
    paths_on_nodes = _take_flag(words, ("--paths-on-nodes", "--paths_on_nodes"))
    plan = None
    if _take_flag(words, ("--dry-run", "--dry_run")):
        from megatron.planner.front.options import take_options

        plan = take_options(words)
    words = _options_last(words)
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    positional, options = words[:first], _as_overrides(words[first:])
    if len(positional) < 2:
        raise ConfigError(f"a script and at least one configuration file are needed\n{USAGE}")
    script = Path(positional[0])
    if not script.is_file():
        script = _program(positional[0])
    configs = [resolve_path(name, folder) for name in positional[1:]]
    overrides = parse_overrides(options)
    invocation = Invocation(script, configs, overrides, options, print_config, plan, paths_on_nodes)
    if plan is not None and invocation.task != "train":
        raise ConfigError(f"--dry-run plans a training, not {script.name}; give train.py")
    return invocation


def _program(name: str) -> Path:
    """The file of a program of this project by its name, with or without `.py`; ConfigError if there is none."""
    program = Path(__file__).parent / "programs" / f"{name.removesuffix('.py')}.py"
    if Path(name).name != name or name.startswith("_") or not program.is_file():
        raise ConfigError(f"{name}: no such script; the programs are train, eval, generate, mcq and embed")
    return program


def _options_last(words: list[str]) -> list[str]:
    """`words` with GPT-NeoX's options moved behind the script and the files; GPT-NeoX accepts them anywhere."""
    front: list[str] = []
    moved: list[str] = []
    rest = list(words)
    while rest and (not rest[0].startswith("-") or rest[0].partition("=")[0] in _BEFORE_FILES):
        word = rest.pop(0)
        if not word.startswith("-"):
            front.append(word)
            continue
        moved.append(word)
        if "=" not in word and rest:
            moved.append(rest.pop(0))
    return [*front, *moved, *rest]


def _as_overrides(words: list[str]) -> list[str]:
    """Options in the form of overrides: short names written out, several values as one YAML list."""
    result: list[str] = []
    rest = list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        name = _SHORT.get(name, name)
        if name == "--autotuning":
            name = "--autotuning_run"
        if name.replace("-", "_") == "__eval_tasks":
            tasks = [value] if equals else []
            while rest and not rest[0].startswith("-"):
                tasks.append(rest.pop(0))
            result += [name, tasks[0] if len(tasks) == 1 and tasks[0].startswith("[") else f"[{', '.join(tasks)}]"]
        else:
            result.append(f"{name}={value}" if equals else name)
    return result


def _take(words: list[str], names: tuple[str, ...]) -> str | None:
    """Remove `NAME VALUE` or `NAME=VALUE` from the arguments and return VALUE."""
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in names:
            if not equals and index + 1 == len(words):
                raise ConfigError(f"{word} needs a folder")
            taken = value if equals else words.pop(index + 1)
            del words[index]
            return taken
    return None


def _take_flag(words: list[str], names: tuple[str, ...]) -> bool:
    found = [word for word in words if word in names]
    for word in found:
        words.remove(word)
    return bool(found)


def configuration_as_yaml(args: NeoXArgs) -> str:
    """The resolved configuration as YAML: all keys, the derived values, DeepSpeed's configuration."""
    derived = {
        "data_parallel_size": args.data_parallel_size,
        "head_dim": args.head_dim,
        # Unknown if the tokenizer is not on this machine.
        "padded_vocab_size": args.padded_vocab_size if args.vocabulary_is_known else None,
        "num_parameters": args.shape.num_parameters if args.vocabulary_is_known else None,
    }
    if args.seq_length and args.train_batch_size:
        derived["tokens_per_step"] = args.train_batch_size * args.seq_length
    parts = [("all keys", args.model_dump()), ("derived values", derived)]
    if args.engine == "deepspeed":
        parts.append(("DeepSpeed's configuration", {"deepspeed_config": args.deepspeed_config}))
    text = [f"# {title}\n{yaml.safe_dump(content, sort_keys=False, width=120)}" for title, content in parts]
    return "\n".join(text)


def main(arguments: list[str]) -> int:
    """Exit code of `python deepy.py ARGUMENTS`."""
    return guarded("deepy.py", partial(_main, arguments))


def _main(arguments: list[str]) -> int:
    if not arguments or any(word in ("-h", "--help") for word in arguments):
        print(USAGE, end="")
        return 0 if arguments else 2
    invocation = parse_command_line(arguments)
    if started_as_rank() and not invocation.print_config and invocation.plan is None:
        run_as_rank(invocation.script, [*map(str, invocation.configs), *invocation.options])
    shows = invocation.print_config or invocation.plan is not None
    args = NeoXArgs.from_ymls(
        invocation.configs,
        invocation.overrides,
        task=invocation.task,
        paths_on_nodes=invocation.paths_on_nodes and shows,  # ranks that are started here have this environment
    )
    for note in args.notes:
        print(f"note: {note}", file=sys.stderr)
    if invocation.print_config:
        print(configuration_as_yaml(args), end="")
        return 0
    if invocation.plan is not None:
        from megatron.planner.front.command import dry_run

        inputs_code = report_inputs(args, invocation.paths_on_nodes)
        return max(inputs_code, dry_run(args, invocation.plan))
    by_srun = uses_srun(args, os.environ)
    if not invocation.paths_on_nodes:
        refuse_wrong_inputs(args, starts=True)
    return (start_by_srun if by_srun else start_local)(invocation.script, args)


def report_inputs(args: NeoXArgs, paths_on_nodes: bool) -> int:
    """For a dry run: report whether the run's inputs exist, or what is wrong with them; returns the exit code."""
    if paths_on_nodes:
        print("inputs: not checked (--paths-on-nodes)", file=sys.stderr)
        return 0
    try:
        refuse_wrong_inputs(args)
    except ConfigError as error:
        print(f"deepy.py: {error}", file=sys.stderr)
        return 2
    return 0
