"""The batch script around a training, here a program of one second: staging, signals, requeueing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from launch.render import main
from tests.support.slurm_cluster import Cluster
from tests.support.slurm_jobs import ODD, configure, finished, light_project, log_of, rendered
from tests.support.token_files import random_documents

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return light_project(tmp_path_factory.mktemp("checkout") / "project")


def seen(folder: Path, start: int = 0, ranks: int = 4) -> list[dict[str, Any]]:
    """Arguments and environment that each rank of a start has recorded."""
    return [json.loads((folder / f"seen-{start}-{rank}.json").read_text()) for rank in range(ranks)]


def all_wait(folder: Path, start: int) -> bool:
    return all((folder / f"seen-{start}-{rank}.json").exists() for rank in range(4))


def stub(folder: Path, name: str, body: str) -> None:
    """Write a program that replaces the real one in a job whose PATH begins with `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def submit(cluster: Cluster, folder: Path, script: Path, plan: str, *options: str, **variables: str) -> str:
    nodes = folder / "disk"  # contains a folder for each virtual node
    nodes.mkdir(exist_ok=True)
    path = os.pathsep.join([str(folder / "stubs"), cluster.env["PATH"]])
    return cluster.submit(script, *options, PLAN=plan, TMPDIR=str(nodes), PATH=path, **variables)


def test_odd_values_arrive_in_every_rank(cluster: Cluster, project: Path, tmp_path: Path) -> None:
    odd_word = re.sub(r"[\n\t\\]", " ", ODD)  # render.py refuses these characters where sbatch reads them
    folder = tmp_path / odd_word
    folder.mkdir()
    configs = configure(folder, "my run, (1) $x 'q'.yml")
    options = [f"--env=ODD={ODD}", f"--job-name={odd_word}", "--", "--wandb_group", json.dumps(ODD)]
    script = rendered(folder, project, *options, configs=configs)
    job = submit(cluster, tmp_path, script, "done", FROM_THE_SHELL=ODD, RANK="7", WORLD_SIZE="9", LOCAL_RANK="7")
    finished(cluster, folder, job, "COMPLETED")
    for rank, found in enumerate(seen(folder)):
        env = found["env"]
        assert env["ODD"] == env["FROM_THE_SHELL"] == ODD
        assert env["SLURM_JOB_NAME"] == odd_word
        assert found["cwd"] == str(folder)
        assert found["argv"][1:] == [*configs, "--wandb_group", json.dumps(ODD), "--num_nodes", "2"]
        # Expanded in the task, not in the batch shell; no variable of another launcher remains.
        assert (env["SLURM_PROCID"], env["SLURM_LOCALID"]) == (str(rank), str(rank % 2))
        assert env["SLURMD_NODENAME"] == f"n{rank // 2}"
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"} & env.keys()
        assert env["TRITON_CACHE_DIR"].endswith(f"/n{rank // 2}/cache/triton-{rank % 2}")
        assert not [name for name in env if name.startswith(("NCCL_", "FI_", "HSA_", "MPICH_"))], "another site's"


def test_a_list_for_export_would_lose_values(cluster: Cluster, project: Path, tmp_path: Path) -> None:
    """The mutation: a list in --export truncates values with commas, which --export=ALL avoids."""
    script = rendered(tmp_path, project)
    text = script.read_text()
    assert text.count("--export=ALL") == 3
    script.write_text(text.replace("--export=ALL", "--export=ALL,LISTED=a,b"))
    finished(cluster, tmp_path, submit(cluster, tmp_path, script, "done"), "COMPLETED")
    assert {found["env"].get("LISTED") for found in seen(tmp_path)} == {"a"}


def pack(folder: Path, archive: Path) -> None:
    """Write an archive like conda-pack's, with bin/python and bin/conda-unpack, which record that they were called."""
    stub(folder, "python", f'export FOUND_IN="$0"\nexec {sys.executable} "$@"')
    (folder / "conda-unpack").write_text(
        "#!/usr/bin/env python\nimport os\nassert 'FOUND_IN' in os.environ\n"
        "open(os.environ['CONDA_UNPACKED'], 'a').write(os.environ['SLURMD_NODENAME'] + '\\n')\n"
    )
    (folder / "conda-unpack").chmod(0o755)
    archive.parent.mkdir(exist_ok=True)
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, "bin")


def test_software_is_unpacked_once_per_node(cluster: Cluster, project: Path, tmp_path: Path) -> None:
    pack(tmp_path / "bin", tmp_path / "soft ware.tar.gz")
    count = 'echo "$SLURMD_NODENAME $*" >>"$COUNTED"; exec /bin/tar "$@"'
    stub(tmp_path / "stubs", "tar", count)
    script = rendered(tmp_path, project, "--environment=soft ware.tar.gz")
    where = {"COUNTED": str(tmp_path / "counted"), "CONDA_UNPACKED": str(tmp_path / "conda")}
    job = submit(cluster, tmp_path, script, "done", **where)
    finished(cluster, tmp_path, job, "COMPLETED")
    assert sorted((tmp_path / "conda").read_text().split()) == ["n0", "n1"]
    unpacked = [line for line in (tmp_path / "counted").read_text().splitlines() if " -xf " in line]
    assert sorted(line.split()[0] for line in unpacked if "software.tar" in line) == ["n0", "n1"]
    assert sorted(line.split()[0] for line in unpacked if "code.tar" in line) == ["n0", "n1"]
    for rank, found in enumerate(seen(tmp_path)):
        here = f"{tmp_path}/disk/neox-{job}/n{rank // 2}"
        assert found["env"]["FOUND_IN"] == f"{here}/software/bin/python"
        assert found["file"] == found["argv"][0] == f"{here}/code/train.py"
        assert f"/n{1 - rank // 2}/" not in json.dumps(found), "another node's disk cannot be seen"
        for name in ("NEOX_CACHE", "MIOPEN_USER_DB_PATH", "TORCH_EXTENSIONS_DIR"):
            assert found["env"][name].startswith(here), name
            assert name in found["folders"], "made on every node, not on that of the batch shell alone"
    assert not list((tmp_path / "disk").rglob("*.*")), "nothing is left on the nodes"


def test_an_archive_that_arrives_damaged_stops_the_job(cluster: Cluster, project: Path, tmp_path: Path) -> None:
    stub(tmp_path / "stubs", "sbcast", '/usr/bin/sbcast "$@" && truncate --size=-1 "${@: -1}"')
    job = submit(cluster, tmp_path, rendered(tmp_path, project), "done")
    log = finished(cluster, tmp_path, job, "FAILED")
    assert "launch: n0: " in log or "launch: n1: " in log
    assert "has checksum" in log
    assert f"launch: stopped: {tmp_path}/runs/{job}/code.tar did not arrive whole on every node" in log.splitlines()[-1]
    assert cluster.field(job, "ExitCode") == "2:0"
    assert not list(tmp_path.glob("seen-*")), "no rank has started"


@pytest.mark.parametrize("checked", [True, False])
def test_a_failed_sbcast_stops_the_job(cluster: Cluster, project: Path, tmp_path: Path, checked: bool) -> None:
    """A real sbcast cannot write. In the mutation its exit code is ignored: the next step fails, without the reason."""
    script = rendered(tmp_path, project)
    if not checked:
        text = script.read_text()
        assert text.count('|| broken "sbcast of') == 1
        script.write_text(text.replace('|| broken "sbcast of', '|| say "sbcast of'))
    job = submit(cluster, tmp_path, script, "done", "--hold")
    (tmp_path / "disk" / f"neox-{job}" / "code.tar").mkdir(parents=True)
    cluster.run("scontrol", "release", job)
    log = finished(cluster, tmp_path, job, "FAILED")
    assert ("launch: stopped: sbcast of" in log) is checked
    assert not list(tmp_path.glob("seen-*")), "no rank has started"


def test_the_warning_saves_and_requeues(cluster: Cluster, project: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "project"
    shutil.copytree(project, checkout)
    job = submit(cluster, tmp_path, rendered(tmp_path, checkout, "--signal-seconds=40"), "wait,wait,done")
    for start in (0, 1):
        cluster.until(lambda: all_wait(tmp_path, start), "the ranks", 60)  # noqa: B023
        (checkout / "train.py").write_text("raise SystemExit('somebody edits the checkout at night')")
        cluster.run("scancel", "--batch", "--signal=USR1", job)
        cluster.start_requeued(job, start + 1)
    log = finished(cluster, tmp_path, job, "COMPLETED")
    assert "job 1, start 1" in re.sub(r"job \d+", "job 1", log), "the log is not overwritten"
    ends = [line for line in log.splitlines() if line.startswith("launch: requeued: ")]
    assert ends == [
        f"launch: requeued: SIGUSR1 at start {start}; all is saved; last save: global_step{start + 1}"
        for start in (0, 1)
    ]
    assert log.splitlines()[-1] == "launch: done; last save: global_step2"
    assert "node failure" not in log
    assert "ended from outside" not in log


def test_a_warning_before_the_training_is_not_lost(cluster: Cluster, project: Path, tmp_path: Path) -> None:
    """Ranks whose bash is slow to start must survive it, too."""
    stub(tmp_path / "stubs", "sbcast", 'until [[ -e $HERE/go ]]; do sleep 0.1; done; exec /usr/bin/sbcast "$@"')
    stub(tmp_path / "stubs", "bash", '[[ ${SLURM_STEP_NUM_TASKS:-1} != 4 ]] || sleep 3; exec /bin/bash "$@"')
    script = rendered(tmp_path, project, "--signal-seconds=40")
    job = submit(cluster, tmp_path, script, "wait,done", HERE=str(tmp_path))
    cluster.until(lambda: "start 1 on n[0-1]" in log_of(tmp_path, job), "the job", 60)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    (tmp_path / "go").touch()
    cluster.start_requeued(job)
    log = finished(cluster, tmp_path, job, "COMPLETED")
    assert "launch: requeued: SIGUSR1 at start 0; all is saved; last save: global_step1" in log


def test_without_the_trap_the_job_does_not_go_on(cluster: Cluster, project: Path, tmp_path: Path) -> None:
    """The mutation: without the trap, the warning ends the batch shell and with it srun."""
    script = rendered(tmp_path, project)
    text = script.read_text()
    assert text.count("trap warn USR1\n") == 1
    script.write_text(text.replace("trap warn USR1\n", ""))
    job = submit(cluster, tmp_path, script, "wait,done")
    cluster.until(lambda: all_wait(tmp_path, 0), "the ranks", 60)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert "requeued" not in finished(cluster, tmp_path, job, "FAILED")


@pytest.mark.parametrize("deadly", [signal.SIGKILL, signal.SIGHUP])
def test_srun_never_outlives_the_batch_script(
    cluster: Cluster, project: Path, tmp_path: Path, deadly: signal.Signals
) -> None:
    """After a requeue, a surviving srun would end a step of the next start, which has the same number.

    The controller is stopped and the ranks ignore signals, so that only the script can end srun.
    """
    job = submit(cluster, tmp_path, rendered(tmp_path, project), "deaf")
    cluster.until(lambda: all_wait(tmp_path, 0), "the ranks", 60)
    sruns = {pid: parent for pid, parent, name in cluster.process_table(job) if name == "srun"}
    (step,) = [pid for pid, parent in sruns.items() if parent not in sruns]  # srun's child is its helper
    controller = cluster.daemons["slurmctld"]
    controller.send_signal(signal.SIGSTOP)
    try:
        os.kill(sruns[step], deadly)
        cluster.until(lambda: step not in cluster.processes(f"SLURM_JOB_ID={job}"), "srun to end", 30)
    finally:
        controller.send_signal(signal.SIGCONT)
    for pid in cluster.processes(f"SLURM_JOB_ID={job}", "SLURM_NTASKS=4"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # Slurm would wait for ranks that ignore signals
    cluster.wait_for(job, "FAILED")


def test_ranks_that_do_not_listen_are_killed_in_time(cluster: Cluster, project: Path, tmp_path: Path) -> None:
    """Ranks that hang, for example: the job must be back in the queue before Slurm ends it for good."""
    job = submit(cluster, tmp_path, rendered(tmp_path, project, "--signal-seconds=4"), "deaf,done")
    cluster.until(lambda: all_wait(tmp_path, 0), "the ranks", 60)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.start_requeued(job)
    log = finished(cluster, tmp_path, job, "COMPLETED")
    assert "the ranks did not save within" in log


@pytest.mark.parametrize(
    ("plan", "state", "starts", "said"),
    [
        pytest.param(
            "stuck,stuck,done", "COMPLETED", 3, "launch: done; last save: none", id="goes on", marks=pytest.mark.slow
        ),
        pytest.param(
            "stuck,stuck,stuck",
            "FAILED",
            3,
            "not requeued: 3 starts in a row without",
            id="bound",
            marks=pytest.mark.slow,
        ),
        pytest.param("bug,killed,bug", "FAILED", 3, "rank 3 on n1 failed: KeyError: 'telescope'", id="bug"),
        pytest.param("user", "FAILED", 1, "launch: stopped: error: the sky is too cloudy", id="user"),
    ],
)
def test_restarts_without_progress_are_counted(
    cluster: Cluster, project: Path, tmp_path: Path, plan: str, state: str, starts: int, said: str
) -> None:
    job = submit(cluster, tmp_path, rendered(tmp_path, project), plan)
    for times in range(1, starts):
        cluster.start_requeued(job, times)
    log = finished(cluster, tmp_path, job, state)
    assert len(re.findall(r"^launch: job \d+, start \d", log, re.MULTILINE)) == starts
    assert said in log.splitlines()[-1]
    if "killed" in plan:
        assert "; first to end: n1: task 2: Killed" in log
    assert len(cluster.processes(f"SLURM_JOB_ID={job}")) == 0


def test_a_cancelled_job_saves_and_stays_out_of_the_queue(cluster: Cluster, project: Path, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, rendered(tmp_path, project), "wait,done")
    cluster.until(lambda: all_wait(tmp_path, 0), "the ranks", 60)
    cluster.run("scancel", job)
    log = finished(cluster, tmp_path, job, "CANCELLED", timeout=30)
    cluster.until(lambda: not cluster.processes(f"SLURM_JOB_ID={job}"), "the processes to end", 30)
    log = log_of(tmp_path, job)
    assert "launch: stopped: ended by Slurm; last save: global_step1; SIGTERM at start 0; all is saved" in log


@pytest.mark.slow  # with a training: test_a_night
def test_a_lost_node_is_named_and_the_job_goes_on(cluster: Cluster, project: Path, tmp_path: Path) -> None:
    """Daemon and ranks of the node die at once during a step; Slurm notices, ends the job and starts it again."""
    job = submit(cluster, tmp_path, rendered(tmp_path, project), "deaf,done")
    cluster.until(lambda: all_wait(tmp_path, 0), "the ranks", 60)
    lost = "n1"
    try:
        cluster.fail_node(lost)
        cluster.start_requeued(job, timeout=90)
        log = finished(cluster, tmp_path, job, "COMPLETED")
    finally:
        cluster.start_node(lost)
        cluster.wait_for_nodes()
    assert f"launch: node failure: {lost} is down" in log
    assert seen(tmp_path, 1)[2]["env"]["SLURMD_NODENAME"] != lost, "another node took its place"


def test_a_node_lost_before_the_training_costs_a_restart(cluster: Cluster, project: Path, tmp_path: Path) -> None:
    stub(tmp_path / "stubs", "sbcast", 'touch "$HERE/staging"; until [[ -e $HERE/go ]]; do sleep 0.1; done; exit 1')
    # A start may still get the lost node if Slurm has not noticed the loss.
    job = submit(cluster, tmp_path, rendered(tmp_path, project), "none,done,done", HERE=str(tmp_path))
    cluster.until((tmp_path / "staging").exists, "the job", 60)
    try:
        cluster.fail_node("n1", notice=True)
        (tmp_path / "stubs" / "sbcast").unlink()
        (tmp_path / "go").touch()
        cluster.start_requeued(job, timeout=90)
        log = finished(cluster, tmp_path, job, "COMPLETED")
    finally:
        cluster.start_node("n1")
        cluster.wait_for_nodes()
    assert "failed, see above and a node does not answer" in log or "ended by Slurm" in log


def test_the_next_start_avoids_the_nodes_on_which_ranks_were_lost(
    cluster: Cluster, project: Path, tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path, rendered(tmp_path, project, "--exclude=n3"), "lost,done")
    cluster.start_requeued(job)
    log = finished(cluster, tmp_path, job, "COMPLETED")
    assert "launch: requeued: rank 2 on n1 did not arrive; last save: none" in log
    assert [found["env"]["SLURMD_NODENAME"] for found in seen(tmp_path, 1)] == ["n0", "n0", "n2", "n2"], log


def test_a_container_has_the_ranks_environment(cluster: Cluster, project: Path, tmp_path: Path) -> None:
    """A stand-in for Singularity records and runs its command."""
    body = (
        'printf "%s\\n" "$@" >"$HERE/entered-$SLURM_PROCID"\nuntil [[ $1 == *.sif ]]; do shift; done; shift\nexec "$@"'
    )
    stub(tmp_path / "stubs", "singularity", body)
    options = ["--container=my image.sif", f"--python={sys.executable}", "--bind=/some where:/data", f"--env=ODD={ODD}"]
    script = rendered(tmp_path, project, *options)
    job = submit(cluster, tmp_path, script, "done", HERE=str(tmp_path), WITH_CONDA="export CONDA=entered")
    finished(cluster, tmp_path, job, "COMPLETED")
    for rank, found in enumerate(seen(tmp_path)):
        assert found["env"]["ODD"] == ODD
        assert found["env"]["CONDA"] == "entered"
        binds = (tmp_path / f"entered-{rank}").read_text().splitlines()[:8]
        here = f"{tmp_path}/disk/neox-{job}/n{rank // 2}"
        assert binds == ["exec", "--bind", here, "--bind", str(tmp_path), "--bind", "/some where:/data", "my image.sif"]


@pytest.mark.parametrize("site", ["frontier", pytest.param("lumi", marks=pytest.mark.slow)])
def test_the_scripts_of_the_sites_run(
    cluster_of_gpus: Cluster, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: str
) -> None:
    """On two nodes that look like the site's to Slurm: flags, 8 ranks per node, the profile, the software, the plan.

    `module`, singularity and the node-local disk have stand-ins; the GPUs are a number in Slurm's configuration.
    """
    cluster = cluster_of_gpus
    monkeypatch.chdir(tmp_path)
    configs = configure(tmp_path)
    (tmp_path / "machine.yml").write_text("num_nodes: 2\nnum_gpus: 8\n")
    (tmp_path / "data").mkdir()
    random_documents(tmp_path / "data/a_text_document", vocab=256)
    account = ["--account=AST123", "--time=1:00:00", "--no-preflight", "-o", "job.sh"]
    assert main([site, "--nodes=2", *account, *configs], project=project) == 0
    script = tmp_path / "job.sh"
    text = script.read_text().replace("#!/bin/bash -l\n", "#!/bin/bash\n")  # it would reset PATH
    disk = {"frontier": "/mnt/bb/$USER", "lumi": "/tmp/$USER"}[site]
    assert disk in text
    script.write_text(text.replace(disk, "$TMPDIR"))
    stub(tmp_path / "stubs", "module", 'echo "module $*"')
    stub(tmp_path / "stubs", "singularity", 'until [[ $1 == *.sif ]]; do shift; done; shift; exec "$@"')
    stub(tmp_path / "stubs", "python", f'exec {sys.executable} "$@"')
    pack(tmp_path / "bin", tmp_path / "software" / "neox-llama.tar.gz")
    job = submit(cluster, tmp_path, script, "done", USER="astronomer", CONDA_UNPACKED=str(tmp_path / "conda"))
    log = finished(cluster, tmp_path, job, "COMPLETED", timeout=200)
    assert "module load " in log
    assert f"of the 57.0 GiB that can be used on {site}" in log, "the plan"
    for rank, found in enumerate(seen(tmp_path, ranks=16)):
        env = found["env"]
        assert (env["SLURM_PROCID"], env["SLURM_LOCALID"]) == (str(rank), str(rank % 8))
        assert env["SLURMD_NODENAME"] == f"n{rank // 8}"
        assert env["SLURM_CPUS_PER_TASK"] == "7"
        assert env["NCCL_NET"] == {"frontier": "OFI", "lumi": "AWS Libfabric"}[site]
        assert ("FI_CXI_RDZV_PROTO" in env) is (site == "frontier")
        assert "NCCL_NCHANNELS_PER_PEER" not in env
    if site == "frontier":
        assert cluster.field(job, "Features") == "nvme"
        assert cluster.field(job, "Network") == "disable_rdzv_get"
        assert cluster.field(job, "Partition") == "batch"
    else:
        assert cluster.field(job, "Partition") == "standard-g"


@pytest.mark.slow
def test_the_warning_of_slurm_itself(cluster: Cluster, project: Path, tmp_path: Path) -> None:
    """Three minutes of wall time, with the warning sent by Slurm itself, not by scancel."""
    script = rendered(tmp_path, project, "--time=3", "--signal-seconds=60")
    job = submit(cluster, tmp_path, script, "wait,done")
    cluster.start_requeued(job, timeout=200)
    log = finished(cluster, tmp_path, job, "COMPLETED")
    assert "launch: warning: the time limit is 60 s away" in log
    assert "launch: requeued: SIGUSR1 at start 0; all is saved; last save: global_step1" in log
