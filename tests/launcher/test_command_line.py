"""deepy.py up to the start of the ranks: arguments, printing, errors in one message and exit code 2."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron.launcher.command_line import parse_command_line
from megatron.launcher.local import rank_environment, reads_input, uses_fork
from megatron.launcher.slurm import hosts_of, srun_command
from megatron.neox_arguments import NeoXArgs
from tests.support.configurations import VALID, keys
from tests.support.waiting import wait_until

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
TINY = ["configs/tiny/model", "configs/tiny/run", "configs/tiny/local.yml"]


def deepy(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "deepy.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_shell_in_its_own_srun_step_overlaps() -> None:
    """`srun --pty bash`, then deepy.py: a plain srun would wait for its own step to end."""
    args = NeoXArgs.from_dict(keys(num_gpus=2))
    batch = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1"}
    inside = batch | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}
    assert "--overlap" in srun_command(args, inside)
    assert "--overlap" not in srun_command(args, batch)
    assert "--overlap" not in srun_command(args, batch | {"SLURM_STEP_ID": str(0xFFFFFFFB)}), "the batch script"


def test_help() -> None:
    result = deepy("--help")
    assert result.returncode == 0
    assert "--print-config" in result.stdout


def test_print_config_shows_the_merged_and_derived_keys() -> None:
    result = deepy("train.py", *TINY, "--train-iters", "7", "--print-config", "--optimizer.params.lr", "5e-3")
    assert result.returncode == 0, result.stderr
    shown = yaml.safe_load(result.stdout)
    assert shown["train_iters"] == 7
    assert shown["optimizer"]["params"]["lr"] == 5e-3
    assert shown["num_parameters"] == 1_787_008
    assert shown["data_parallel_size"] == 2
    assert shown["deepspeed_config"]["gradient_clipping"] == 1.0
    assert "precision auto" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train.py", *TINY, "--hiden_size", "3"), "--hiden_size: unknown key hiden_size; did you mean hidden_size?"),
        (("train.py", *TINY, "--model_parallel_size", "3"), "8 ranks cannot be divided"),
        (("train.py", "configs/nothing"), "configs/nothing.yml: cannot be read"),
        (("nothing.py", *TINY), "nothing.py: no such script"),
        (("train.py",), "at least one configuration file"),
        (("train.py", *TINY, "--autotuning", "run"), "--dry-run --search ranks the layouts instead"),
        (("train.py", *TINY, "--include", "a:1"), "choose them with Slurm's --nodelist and --exclude"),
        (
            ("eval.py", *TINY, "--eval_tasks", "lambada_openai", "piqa"),
            "eval_tasks needs lm-eval, which is not installed",
        ),
        (
            ("train.py", *TINY, "--num_nodes", "2"),
            "not a Slurm allocation, and here deepy.py starts the ranks of one machine",
        ),
        (("train.py", TINY[0], TINY[0]), "num_layers is given twice"),
        ((), "usage:"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(words: tuple[str, ...], message: str) -> None:
    result = deepy(*words)
    assert result.returncode == 2
    assert message in result.stderr + result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "spelling", [["-d", "configs/tiny"], ["--conf_dir", "configs/tiny"], ["--conf_dir=configs/tiny"]]
)
def test_a_folder_is_put_in_front(spelling: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    invocation = parse_command_line(["eval.py", *spelling, "model", "run.yml", "-o", "out.jsonl", "--load", "x"])
    assert invocation.configs == [Path("configs/tiny/model.yml"), Path("configs/tiny/run.yml")]
    assert invocation.overrides == {"sample_output_file": "out.jsonl", "load": "x"}
    assert invocation.task == "eval"


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        (["-H", "hosts", "model"], {"hostfile": "hosts"}),
        (["--hostfile=hosts", "model", "run"], {"hostfile": "hosts"}),
        (["model", "--wandb_group", "a", "run", "--wandb_team=b"], {"wandb_group": "a", "wandb_team": "b"}),
        (["model", "--iteration", "100", "--eval_results_prefix", "x"], {"iteration": 100, "eval_results_prefix": "x"}),
        (["model", "--eval_tasks", "lambada", "piqa", "--load", "x"], {"eval_tasks": ["lambada", "piqa"], "load": "x"}),
        (["model", "--eval_tasks", "piqa"], {"eval_tasks": ["piqa"]}),
        (["model", "--eval-tasks=[piqa, sciq]"], {"eval_tasks": ["piqa", "sciq"]}),
        (["-i", "in.txt", "-o", "out.txt", "model"], {"sample_input_file": "in.txt", "sample_output_file": "out.txt"}),
        (["model", "--autotuning", "run"], {"autotuning_run": "run"}),
    ],
)
def test_the_forms_of_gpt_neox_are_understood(
    words: list[str], overrides: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options before, between and after the files; several values of one option."""
    monkeypatch.chdir(ROOT)
    invocation = parse_command_line(["train.py", *words])
    assert invocation.overrides == overrides
    assert [path.stem for path in invocation.configs] in (["model"], ["model", "run"])
    assert (len(invocation.configs) == 2) == ("run" in words and "--autotuning" not in words)


def test_a_hostfile_of_several_machines_needs_slurm(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# ours\nnode-1 slots=4\nnode-2 slots=4\n")
    result = deepy("train.py", "-H", str(hosts), *TINY)
    assert result.returncode == 2
    assert f"hostfile {hosts} names 2 machines, but this is not a Slurm allocation" in result.stderr
    assert hosts_of(str(hosts)) == ["node-1", "node-2"]
    assert hosts_of("nowhere") == hosts_of(None) == []


def test_a_vocabulary_elsewhere_prints_but_does_not_start() -> None:
    """deepy.py on a login node, while the tokenizer exists only where the job runs."""
    words = ("train.py", *TINY, "--vocab_size", "null", "--vocab_file", "nowhere/tokenizer.json")
    printed = deepy(*words, "--print-config")
    assert printed.returncode == 0, printed.stderr
    shown = yaml.safe_load(printed.stdout)
    assert (shown["vocab_size"], shown["num_parameters"]) == (None, None)
    started = deepy(*words)
    assert started.returncode == 2
    assert "nowhere/tokenizer.json" in started.stderr
    started = deepy(*words, "--paths-on-nodes")
    assert started.returncode == 2
    assert started.stderr.splitlines()[-1].startswith("deepy.py: vocab_size is taken from the tokenizer, but vocab_f")


def test_scripts_have_their_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    tasks = {name: parse_command_line([name, "x"]).task for name in ("train.py", "eval.py", "generate.py")}
    assert tasks == {"train.py": "train", "eval.py": "eval", "generate.py": "generate"}


def test_cpu_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    args = NeoXArgs.from_dict(keys(num_gpus=8))
    assert rank_environment(args)["OMP_NUM_THREADS"] == "2"
    assert rank_environment(args)["DS_ACCELERATOR"] == "cpu"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert rank_environment(args)["OMP_NUM_THREADS"] == "3"


def test_ranks_are_forked_on_cpus_only_unless_asked() -> None:
    assert uses_fork(NeoXArgs.from_dict(VALID))
    assert not uses_fork(NeoXArgs.from_dict(keys(distributed_backend="nccl")))
    assert not uses_fork(NeoXArgs.from_dict(keys(launcher="torchrun")))


@pytest.mark.parametrize(("kind", "shown"), [("interactive", "typed"), ("unconditional", "")])
def test_only_interactive_programs_get_standard_input(kind: str, shown: str) -> None:
    args = NeoXArgs.from_dict(keys(from_scratch=None, load="x", vocab_file="x", text_gen_type=kind), task="generate")
    assert reads_input(args) == (kind == "interactive")
    program = (
        "import os, sys\nfrom megatron.launcher.local import supervise\n"
        f"sys.exit(supervise(['cat'], dict(os.environ), with_input={reads_input(args)}))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, input="typed", capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, shown)


LISTENER = """
import signal, sys, time
from pathlib import Path

def count(number, frame):
    heard.append(number)
    if len(heard) == 3:
        sys.exit(75)

heard = []
signal.signal(signal.SIGUSR1, count)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
Path(sys.argv[1]).touch()
while True:
    time.sleep(0.05)
"""


def test_one_warning_is_repeated_for_an_srun_that_drops_it(tmp_path: Path) -> None:
    listens = tmp_path / "listens"
    program = (
        "import os, signal, sys\nfrom megatron.launcher.local import supervise\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})\n"
        "code = supervise(sys.argv[1:], dict(os.environ), repeat_warning=0.3)\nsys.exit(code)"
    )
    words = [sys.executable, "-c", program, sys.executable, "-c", LISTENER, str(listens)]
    deepy = subprocess.Popen(words, cwd=ROOT)
    try:
        wait_until(listens.exists, "the listener", 60, deepy)
        deepy.send_signal(signal.SIGUSR1)
        assert deepy.wait(timeout=60) == 75
    finally:
        deepy.kill()


def test_children_of_deepy_end_with_it_even_if_it_is_killed(tmp_path: Path) -> None:
    """Including programs that do not do so by themselves, such as srun."""
    started = tmp_path / "started"
    child = ["bash", "-c", f"echo $$ >{started}.part && mv {started}.part {started} && exec sleep 600"]
    program = f"import os\nfrom megatron.launcher.local import supervise\nsupervise({child!r}, dict(os.environ))"
    deepy = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    try:
        wait_until(started.exists, "the child", 60, deepy)
        pid = int(started.read_text())
        deepy.kill()
        deepy.wait()
        name = Path(f"/proc/{pid}/comm")
        wait_until(lambda: not name.exists() or "sleep" not in name.read_text(), "the child's end", 30)
    finally:
        deepy.kill()
