"""Rendered scripts for 256 nodes: golden files, bash, shellcheck; jobs that a site does not allow are rejected."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from launch.render import main
from launch.sites import SITES, read_site, seconds
from tests.support.configurations import keys
from tests.support.requirements import need

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).resolve().parent / "golden"
RUN = ["configs/llama31_70b/model.yml", "configs/llama31_70b/cpt.yml"]
ARGUMENTS = {
    "frontier": ["frontier", "--nodes", "256", "--account", "AST123", *RUN, "configs/llama31_70b/frontier.yml"],
    "lumi": ["lumi", "--nodes", "256", "--account", "project_465000001", *RUN, "configs/llama31_70b/lumi.yml"],
}
PROJECT = {"frontier": "/lustre/orion/ast123/proj-shared/neox-llama", "lumi": "/project/project_465000001/neox-llama"}


def render(site: str, *more: str) -> str:
    printed = io.StringIO()
    project = Path(PROJECT[site])
    with contextlib.redirect_stdout(printed), contextlib.chdir(ROOT):
        assert main([*ARGUMENTS[site], "--paths-on-nodes", *more], project=project, directory=project) == 0
    return printed.getvalue()


@pytest.mark.parametrize("site", sorted(ARGUMENTS))
def test_golden_files(site: str) -> None:
    """A change to these files affects every user of the site: check the difference, then rewrite them with
    `python -m tests.launch.test_render`."""
    assert render(site) == (GOLDEN / f"{site}.sh").read_text()


@pytest.mark.parametrize("site", sorted(ARGUMENTS))
def test_bash_reads_the_script(site: str) -> None:
    subprocess.run(["bash", "-n", str(GOLDEN / f"{site}.sh")], check=True)


@pytest.mark.parametrize("site", sorted(ARGUMENTS))
def test_shellcheck_finds_nothing(site: str) -> None:
    need("shellcheck", shutil.which("shellcheck") is not None, "apt-get install shellcheck")
    result = subprocess.run(["shellcheck", str(GOLDEN / f"{site}.sh")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def code(script: str) -> str:
    return "\n".join(line for line in script.splitlines() if not line.startswith("# "))


def test_frontier_and_lumi_have_different_binding_schemes() -> None:
    """Two schemes, each correct by itself: one visible GCD per task, or all GCDs and masks of cores."""
    frontier, lumi = code(render("frontier")), code(render("lumi"))
    for flag in (
        "--gpus-per-task=1",
        "--gpu-bind=closest",
        "--cpus-per-task=7",
        '--ntasks="$((SLURM_JOB_NUM_NODES * 8))"',
        "--ntasks-per-node=8",
    ):
        assert flag in frontier
    assert "mask_cpu" not in frontier
    assert "--gpus-per-node" not in frontier
    assert "--gpus-per-node=8" in lumi
    masks = re.search(r"--cpu-bind=mask_cpu:(\S+)", lumi)
    assert masks
    assert "gpu-bind" not in lumi
    assert "gpus-per-task" not in lumi
    # Local rank r takes GCD r; its mask has the cores of that GCD, without the first of their L3 region.
    first_core = {0: 48, 1: 56, 2: 16, 3: 24, 4: 0, 5: 8, 6: 32, 7: 40}  # Frontier user guide; LUMI has the same node
    expected = [sum(1 << core for core in range(first_core[gcd] + 1, first_core[gcd] + 8)) for gcd in range(8)]
    assert [int(mask, 16) for mask in masks[1].split(",")] == expected


def variables(site: str) -> set[str]:
    text = (ROOT / "launch" / site / "environment.sh").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return set(re.findall(r"\b([A-Z][A-Z0-9_]+)=", "\n".join(lines)))


def test_no_site_gets_the_variables_of_another() -> None:
    assert variables("generic_slurm") == set()
    assert {"NCCL_NET", "FI_CXI_RDZV_PROTO", "MASTER_ADDR"} <= variables("frontier")
    for site, other in (("frontier", "lumi"), ("lumi", "frontier")):
        script = code(render(site))
        for name in variables(other) - variables(site):
            assert f"{name}=" not in script, f"{name} of {other} in the script of {site}"
        assert other not in script.replace("configs/llama31_70b", "")
    assert "lustre" not in render("lumi")
    assert "/mnt/bb" not in render("lumi")


@pytest.mark.parametrize("site", SITES)
def test_every_variable_has_its_reason(site: str) -> None:
    """Each paragraph of a profile begins with a comment, and no line of values stands without one above it."""
    lines = (ROOT / "launch" / site / "environment.sh").read_text().splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        explained = before.startswith(("#", "export", "module", "MASTER_ADDR"))
        assert not line or line.startswith("#") or explained, line
    assert "export NCCL_NCHANNELS_PER_PEER" not in "\n".join(lines), "unstable gradients with pipeline parallelism"
    assert "memhooks" not in code("\n".join(lines)), "deadlocks"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("render.py: ")
    return printed.err


def run_files(folder: Path, nodes: int, ranks: int, **changes: object) -> list[str]:
    (folder / "run.yml").write_text(yaml.safe_dump(keys(**changes)))
    (folder / "machine.yml").write_text(yaml.safe_dump({"num_nodes": nodes, "num_gpus": ranks}))
    return [str(folder / "run.yml"), str(folder / "machine.yml")]


@pytest.mark.parametrize(
    ("nodes", "time", "limit"),
    [
        (256, "12:00:01", "a job of 256 nodes may take 12 hours"),
        (184, "13:00:00", "a job of 184 nodes may take 12 hours"),
        (183, "6:00:01", "a job of 183 nodes may take 6 hours"),
        (92, "0-7", "a job of 92 nodes may take 6 hours"),
        (91, "121", "a job of 91 nodes may take 2 hours"),
        (1, "2:30:00", "a job of 1 node may take 2 hours"),
        (9473, "1:00:00", "allows at most 9472"),
    ],
)
def test_time_limits_of_frontier(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, nodes: int, time: str, limit: str
) -> None:
    """Expected values are from Frontier's user guide, scheduling policy."""
    arguments = ["frontier", "--account=A", f"--nodes={nodes}", *run_files(tmp_path, nodes, 8)]
    assert limit in refused(capsys, *arguments, f"--time={time}")


@pytest.mark.parametrize(("nodes", "most"), [(256, "12:00:00"), (183, "06:00:00"), (91, "02:00:00")])
def test_the_longest_time_is_the_default(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, nodes: int, most: str
) -> None:
    files = run_files(tmp_path, nodes, 8)
    assert main(["frontier", "--account=A", "--paths-on-nodes", f"--nodes={nodes}", *files]) == 0
    assert f"#SBATCH --time={most}\n" in capsys.readouterr().out


def test_a_day_in_the_extended_partition(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = run_files(tmp_path, 64, 8)
    arguments = ["frontier", "--account=A", "--nodes=64", "--partition=extended", "--time=1-0", *files]
    assert main([*arguments, "--paths-on-nodes"]) == 0
    assert "#SBATCH --partition=extended\n" in capsys.readouterr().out
    assert "--time 25:00:00" in refused(capsys, *arguments[:-3], "--time=25:00:00", *files)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30", 1800), ("30:15", 1815), ("2:00:00", 7200), ("1-0", 86400), ("1-2:30", 95400), ("1-00:00:05", 86405)],
)
def test_times_are_read_as_slurm_reads_them(text: str, expected: int) -> None:
    """Formats are those of sbatch(1), --time."""
    assert seconds(text) == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mars"], "mars: no such site; there are frontier, generic_slurm, lumi"),
        (["frontier"], "charges a project: give --account"),
        (["generic_slurm"], "give --time HOURS:MINUTES:SECONDS"),
        (["generic_slurm", "--time=a day"], "--time a day: expected HOURS:MINUTES:SECONDS"),
        (["generic_slurm", "--time=11"], "leaves no time to train: the warning comes --signal-seconds 600"),
        (["generic_slurm", "--time=60", "--nodes=3"], "--nodes is 3, but the configuration is for num_nodes 2"),
        (["generic_slurm", "--time=60", "--job-name=a\nb"], "--job-name is 'a\\nb': sbatch reads it from one line"),
        (["generic_slurm", "--time=60", "--env=A"], "--env A: expected NAME=VALUE"),
        (["generic_slurm", "--time=60", "--python=p", "--environment=e"], "give one of --environment, --python"),
        (["frontier", "--account=A", "--partition=debug"], "partition debug is not in launch's profile"),
        (["lumi", "--account=A", "--", "--num_gpus", "4"], "4 ranks on a node; a node of LUMI-G (CSC) has 8 GCDs"),
        (["generic_slurm", "--time=60", "--", "--num_gpus", "3"], "3 ranks on a node cannot hold whole tensor"),
        (["generic_slurm", "--time=60", "--", "--train_itres", "3"], "train_iters"),
    ],
)
def test_impossible_jobs_are_rejected(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], said: str
) -> None:
    files = run_files(tmp_path, 2, 8, model_parallel_size=2)
    if "--num_gpus" in arguments:
        (tmp_path / "machine.yml").write_text("num_nodes: 2\n")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    nodes = [] if any("--nodes" in word for word in arguments) else ["--nodes=2"]
    words = [*arguments[:split], *nodes, *files, *arguments[split:]]
    assert said in refused(capsys, *words)


def test_groups_that_would_leave_their_node_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = run_files(tmp_path, 2, 2, model_parallel_size=4)
    said = refused(capsys, "generic_slurm", "--nodes=2", "--time=60", *files)
    assert "2 ranks on a node cannot hold whole tensor-parallel groups of 4" in said


def test_the_run_files_of_the_70b_are_in_the_scripts() -> None:
    for site in ARGUMENTS:
        script = render(site)
        assert f"    configs/llama31_70b/{site}.yml\n" in script
        assert "save=checkpoints/cpt" in script
        assert f"--dry-run --machine {site}" in script


def test_a_container_is_entered_with_its_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = run_files(tmp_path, 2, 2)
    words = ["generic_slurm", "--nodes=2", "--time=60", "--container=my image.sif", "--bind=/data:/data", *files]
    words.append("--paths-on-nodes")
    assert main([*words, "--python=python3.11"], directory=Path("/work dir")) == 0
    script = capsys.readouterr().out
    assert "--bind \"$here\" --bind '/work dir' --bind /data:/data" in script
    assert "'my image.sif' bash -c" in script
    assert script.count(' python3.11 "$@"') == 1


def test_profiles_are_read_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch import sites
    from megatron.neox_arguments import ConfigError

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "site.yml").write_text("title: mine\nnode_disk: /tmp\nsruns: []\n")
    monkeypatch.setattr(sites, "HERE", tmp_path)
    monkeypatch.setattr(sites, "SITES", ["mine"])
    with pytest.raises(ConfigError, match="sruns"):
        read_site("mine")


def test_missing_inputs_are_reported_before_queueing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Load, data, tokenizer and disk space, all in one message; with --paths-on-nodes the nodes check."""
    files = run_files(
        tmp_path, 1, 2, load=str(tmp_path / "gone"), from_scratch=None, vocab_file=str(tmp_path / "tokenizer.json"),
        train_data_paths=[str(tmp_path / "data")], save="/proc/checkpoints", checkpoint_factor=1,
    )  # fmt: skip
    said = refused(capsys, "generic_slurm", "--nodes=1", "--time=60", *files)
    for text in ("gone is not a folder", "tokenizer.json is not there", "data.idx: no such file", "save: /proc"):
        assert text in said
    assert main(["generic_slurm", "--nodes=1", "--time=60", "--paths-on-nodes", *files]) == 0


def test_a_script_with_secrets_is_its_owners_alone(tmp_path: Path) -> None:
    output = tmp_path / "job.sh"
    output.write_text("an older one")
    output.chmod(0o644)
    words = ["generic_slurm", "--nodes=1", "--time=60", "--env", "KEY=secret", "--paths-on-nodes", "-o", str(output)]
    assert main([*words, *run_files(tmp_path, 1, 2)]) == 0
    assert "export KEY=secret" in output.read_text()
    assert output.stat().st_mode & 0o777 == 0o600


def test_a_missing_folder_for_the_script_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["generic_slurm", "--nodes=1", "--time=60", "--paths-on-nodes", *run_files(tmp_path, 1, 2)]
    assert f"there is no folder {tmp_path / 'x'}" in refused(capsys, *words, "-o", str(tmp_path / "x" / "job.sh"))


@pytest.mark.parametrize(
    ("save", "value"),
    [
        ("$SCRATCH/my runs", "/scratch/my runs"),
        ("${SCRATCH}/$$x", "/scratch/$x"),
        ("~/run", "/home/me/run"),
        ('a"b`c\\d$SCRATCH', 'a"b`c\\d/scratch'),
        ("plain", "plain"),
    ],
)
def test_variables_in_paths_reach_the_job(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, save: str, value: str
) -> None:
    """The job's shell leaves the variables for the ranks to expand."""
    files = run_files(tmp_path, 1, 2, save=save, checkpoint_factor=1)
    assert main(["generic_slurm", "--nodes=1", "--time=60", "--paths-on-nodes", *files]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("save="))
    env = {"SCRATCH": "/scratch", "HOME": "/home/me"}
    shell = subprocess.run(["bash", "-c", f'{line}\nprintf %s "$save"'], capture_output=True, text=True, env=env)
    assert shell.stdout == value


if __name__ == "__main__":
    for name in ARGUMENTS:
        (GOLDEN / f"{name}.sh").write_text(render(name))


def test_the_folder_on_a_node_belongs_to_this_user(tmp_path: Path) -> None:
    """Names in /tmp can be guessed: files that another user put there must not be used."""
    script = (ROOT / "launch" / "job.sh").read_text()
    function = script[script.index("make_folders() {") :].partition("\n}\n")[0].replace("@NODE_DISK@", str(tmp_path))
    program = f'{function}\n}}\nhere() {{ echo "{tmp_path}/neox-7/rank"; }}\nmake_folders'
    env = {**os.environ, "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1"}

    def made() -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", "-c", program], env=env, capture_output=True, text=True, timeout=60)

    (tmp_path / "neox-7").mkdir(mode=0o777)
    assert made().returncode == 0
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "neox-7").rglob("*")} == {0o700}
    assert stat.S_IMODE((tmp_path / "neox-7").stat().st_mode) == 0o700
    shutil.rmtree(tmp_path / "neox-7")
    (tmp_path / "neox-7").symlink_to(tmp_path / "theirs")
    (tmp_path / "theirs").mkdir()
    refused = made()
    assert refused.returncode == 1
    assert f"{tmp_path}/neox-7 belongs to somebody else" in refused.stderr
    assert not list((tmp_path / "theirs").iterdir())
