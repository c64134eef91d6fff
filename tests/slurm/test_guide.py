"""Every command of docs/launching.md in the order of the guide; Slurm commands run under a real Slurm."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from launch.render import main
from launch.sites import Site
from megatron.launcher.command_line import parse_command_line
from megatron.neox_arguments import NeoXArgs
from tests.support.slurm_cluster import Cluster
from tests.support.slurm_jobs import ROOT, configure, finished, light_project, log_of

pytestmark = pytest.mark.slurm

GUIDE = (ROOT / "docs" / "launching.md").read_text()


def test_commands_of_the_guide(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = light_project(tmp_path / "project")
    folder = tmp_path / "run"
    folder.mkdir()
    configure(folder)
    (folder / "model.yml").write_text("{}\n")
    (folder / "machine.yml").rename(folder / "two_nodes.yml")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "train.py").symlink_to(ROOT / "train.py")
    monkeypatch.chdir(folder)
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)
    job, plan = "", iter(["wait,wait", "wait"])
    for command in [line for block in blocks for line in block.splitlines()]:
        words = shlex.split(command.replace("JOBID", job))
        if words[:2] == ["python", "launch/render.py"]:
            more = (
                ["--no-preflight", "--env=MASTER_ADDR=127.0.0.1", "--signal-seconds=40"]
                if words[2] == "generic_slurm"
                else []
            )
            assert main([*words[2:3], *more, *words[3:]], project=project) == 0, command
        elif words[:2] == ["python", "deepy.py"]:  # the plan itself is covered by the planner's tests
            invocation = parse_command_line(words[2:])
            assert invocation.plan is not None
            assert NeoXArgs.from_ymls(invocation.configs, invocation.overrides).global_num_gpus == 2048
        elif words[0] == "sbatch":
            said = cluster.run(*words, PLAN=next(plan), TMPDIR=str(tmp_path))
            job = said.split()[-1]
            cluster.until(lambda: len(list(folder.glob("seen-0-?.json"))) == 4, "the ranks", 60)
        elif words[0] == "scontrol":
            cluster.until(lambda: cluster.state(job) == "PENDING", "the job in the queue", 60)  # noqa: B023
            cluster.run(*words)
            assert cluster.field(job, "ExcNodeList") == "n3"
            cluster.start_requeued(job)
            cluster.until(lambda: len(list(folder.glob("seen-1-?.json"))) == 4, "the ranks", 60)
        else:
            assert words[0] in ("squeue", "tail", "scancel"), command
            said = cluster.run(*words)
            assert words[0] == "scancel" or job in said, said
    log = finished(cluster, folder, job, "CANCELLED")
    cluster.until(lambda: "launch: stopped: ended by Slurm" in log_of(folder, job), "the last words", 30)
    assert "launch: requeued: SIGUSR1 at start 0; all is saved; last save: global_step1" in log


def test_the_site_table_of_the_guide_is_complete() -> None:
    table = GUIDE.partition("## Another site")[2]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(Site.model_fields)


def test_quoted_lines_are_those_of_the_script() -> None:
    script = (ROOT / "launch" / "job.sh").read_text()
    for text in ("the start before was ended from outside", "launch: node failure: ", ", start $(("):
        assert text in script
    assert yaml.safe_load((ROOT / "launch/generic_slurm/site.yml").read_text())["title"]
