"""Following the advice in messages of the command line and of the start of ranks, literally, fixes the problem."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.launcher import slurm
from megatron.launcher.command_line import parse_command_line
from megatron.neox_arguments import ConfigError, NeoXArgs
from megatron.neox_arguments.keys import evaluation, runtime
from megatron.neox_arguments.load import apply_overrides, parse_overrides, read_yaml
from megatron.neox_arguments.registry import Task
from megatron.parallel.handover import rank_args
from megatron.parallel.rank_env import find_started_rank, set_rendezvous
from tests.support.configurations import IMAGES, VALID, keys

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
TINY = [str(ROOT / f"configs/tiny/{name}.yml") for name in ("model", "run", "local")]


def test_a_file_holds_keys_with_their_values(tmp_path: Path) -> None:
    path = tmp_path / "a.yml"
    path.write_text("- train_iters\n- 3\n")
    with pytest.raises(ConfigError, match="expected `key: value` lines"):
        read_yaml(path)
    path.write_text("train_iters: 3\n")
    assert read_yaml(path)[0] == {"train_iters": 3}


def test_files_come_before_the_first_option() -> None:
    with pytest.raises(ConfigError, match=r"run\.yml: expected `--key value` here \(files come before the first --key"):
        parse_command_line(["train.py", TINY[0], "--train_iters", "3", "run.yml"])
    found = parse_command_line(["train.py", *TINY, "--train_iters", "3"])
    assert (len(found.configs), found.overrides) == (3, {"train_iters": 3})


def test_a_dry_run_is_of_a_training() -> None:
    with pytest.raises(ConfigError, match=r"--dry-run plans a training, not eval\.py; give train\.py"):
        parse_command_line(["eval.py", *TINY, "--dry-run"])
    assert parse_command_line(["train.py", *TINY, "--dry-run"]).plan is not None


@pytest.mark.parametrize("key", ["te_mha", "rope_fusion"])
def test_kernels_replaces_the_fusion_keys(key: str) -> None:
    """Advice on rejected keys and on keys without effect."""
    advice = "`kernels` chooses fused operations"
    try:
        said = "\n".join(NeoXArgs.from_dict(keys(**{key: True})).notes)
    except ConfigError as error:
        said = str(error)
    assert advice in said
    args = NeoXArgs.from_dict(keys(kernels="reference"))
    assert args.kernels == "reference"
    assert advice not in "\n".join(args.notes)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_enabled_says_the_precision(precision: str) -> None:
    doubled = NeoXArgs.from_dict(keys(precision=None, **{precision: {precision: True, "enabled": True}}))
    assert f"{precision}.{precision} (`enabled` turns it on)" in "\n".join(doubled.notes)
    args = NeoXArgs.from_dict(keys(precision=None, **{precision: {"enabled": True}}))
    assert args.precision == doubled.precision == {"fp16": "fp16", "bf16": "bfloat16"}[precision]
    assert "`enabled`" not in "\n".join(args.notes)


def test_layouts_are_ranked_by_a_search() -> None:
    with pytest.raises(ConfigError) as refused:
        NeoXArgs.from_dict(keys(autotuning_run="tune"))
    (options,) = re.findall(r"used; (--.*) ranks the layouts", str(refused.value))
    invocation = parse_command_line(["train.py", *TINY, *options.split()])
    assert invocation.plan is not None
    assert invocation.plan.search


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the advised `pip install`, the library is found."""
    packages: set[str] = set()
    for module in (runtime, evaluation):
        monkeypatch.setattr(module, "find_spec", lambda name: name if name in packages else None)
    asked = {"eval_tasks": ["arc_easy"], "from_scratch": None, "load": "runs/a", "vocab_file": "tokenizer.json"}
    assert "without pip install wandb" in "\n".join(NeoXArgs.from_dict(keys(use_wandb=True)).notes)
    with pytest.raises(ConfigError, match=r"pip install \.\[eval\]"):
        NeoXArgs.from_dict(keys(**asked), task="eval")
    packages.update(("wandb", "lm_eval"))
    assert "wandb" not in "\n".join(NeoXArgs.from_dict(keys(use_wandb=True)).notes)
    NeoXArgs.from_dict(keys(**asked), task="eval")
    extras = (ROOT / "requirements-eval.txt").read_text()
    assert "lm-eval" in extras or "lm_eval" in extras


TEXT = {"vocab_file": "tokenizer.json"}
INPUTS: list[tuple[Task, dict[str, Any]]] = [("mcq", TEXT), ("embed", TEXT), ("generate", IMAGES)]


@pytest.mark.parametrize(("task", "changes"), INPUTS)
def test_missing_program_inputs_are_given_as_advised(task: Task, changes: dict[str, Any]) -> None:
    base = keys(**{"from_scratch": None, "load": "runs/a", **changes})
    with pytest.raises(ConfigError) as missing:
        NeoXArgs.from_dict(base, task=task)
    (option,) = re.findall(r"is missing: .* \((--\S+ \S+)\)", str(missing.value))
    apply_overrides(base, {}, parse_overrides(option.split()))
    NeoXArgs.from_dict({key: value for key, value in base.items() if value is not None}, task=task)


RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
STEP = {
    **{"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"},
    **{"SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
}


def test_variables_of_another_launcher_are_unset() -> None:
    env = RANK | STEP
    with pytest.raises(ConfigError, match="unset RANK, WORLD_SIZE and LOCAL_RANK there") as said:
        find_started_rank(env)
    (names,) = re.findall("unset ([A-Z_, ]+ and [A-Z_]+)", str(said.value))
    for name in re.split(", | and ", names):
        del env[name]
    started = find_started_rank(env)
    assert started is not None
    assert (started.rank, started.world_size) == (5, 8)


def test_a_step_keeps_the_variables_of_slurm() -> None:
    env = {name: value for name, value in STEP.items() if name != "SLURM_PROCID"}
    with pytest.raises(ConfigError, match="start the ranks by srun, and do not unset Slurm's variables"):
        find_started_rank(env)
    assert find_started_rank(STEP) is not None


def test_an_address_is_exported() -> None:
    env = {"RANK": "0"}
    with pytest.raises(ConfigError, match="export MASTER_ADDR, the name of rank 0's node"):
        set_rendezvous(env)
    env["MASTER_ADDR"] = "node-1"
    set_rendezvous(env)
    assert env["MASTER_PORT"]


def test_files_are_given_to_deepy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py")])
    with pytest.raises(ConfigError, match="configuration files are missing: ") as said:
        rank_args([])
    (command,) = re.findall("missing: python (.*)", str(said.value))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.yml").write_text(yaml.safe_dump(VALID))
    (tmp_path / "run.yml").write_text("seed: 3\n")
    program, *words = command.split()
    assert program == "deepy.py"
    found = parse_command_line(words)
    assert NeoXArgs.from_ymls(found.configs, found.overrides).seed == 3


def test_deepy_is_called_where_srun_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside the container, with srun in PATH."""
    for name, value in {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "PATH": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm, "supervise", lambda *words, **options: 0)
    args = NeoXArgs.from_dict(keys())
    with pytest.raises(ConfigError, match=r"srun is not on PATH; call deepy\.py outside the container"):
        slurm.start_by_srun(ROOT / "train.py", args)
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    os.chmod(tmp_path / "srun", 0o700)
    assert slurm.start_by_srun(ROOT / "train.py", args) == 0
