"""deepy.py with real ranks: they find their place, failures are reported once, and no process is left running."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron.neox_arguments import NeoXArgs
from tests.support.configurations import VALID, keys
from tests.support.ranks import run_ranks
from tests.support.waiting import wait_until

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import gc, os, signal, sys, time
from megatron.launcher.rank_main import run
from megatron.parallel.process_groups import initialize
from megatron.neox_arguments import ConfigError

def program(args):
    place = initialize(args)
    rank, mode = place.rank, os.environ["MODE"]
    import torch.distributed as dist
    if mode == "places":
        with open(f"{args.log_dir}/{rank}", "w") as file:
            file.write(f"{place.pp_rank} {place.dp_rank} {place.tp_rank} {place.local_rank} {place.device}")
    elif mode == "imports" and rank == 0:
        frozen = gc.isenabled() and gc.get_freeze_count()
        import megatron.core.tensor_parallel, deepspeed.runtime.zero.muon.muon_optimizer
        print("exempt from collection:", frozen)
        print("compiler loaded:", "torch._inductor.compile_fx" in sys.modules)
    elif mode == "user-all":
        raise ConfigError("the sky is too cloudy")
    elif mode == "user-one" and rank == 1:
        raise ConfigError("the sky is too cloudy")
    elif mode == "bug" and rank == 1:
        raise KeyError("telescope")
    elif mode == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    elif mode == "code" and rank == 1:
        sys.exit(7)
    elif mode == "sleep":
        with open(f"{args.log_dir}/{rank}", "w") as file:
            file.write(str(os.getpid()))
        time.sleep(600)
    dist.barrier()

if __name__ == "__main__":
    run(program)
"""


def prepare(folder: Path, **changes: Any) -> list[str]:
    """Write a script and its configuration to `folder`; returns the deepy command. MODE is an environment variable."""
    (folder / "train.py").write_text(SCRIPT)
    settings = keys(log_dir=str(folder), num_gpus=2, **changes)
    (folder / "run.yml").write_text(yaml.safe_dump(settings))
    return [
        sys.executable,
        str(ROOT / "deepy.py"),
        str(folder / "train.py"),
        str(folder / "run.yml"),
        "--paths-on-nodes",
    ]


def launch(folder: Path, mode: str, **changes: Any) -> subprocess.CompletedProcess[str]:
    """Run deepy from a working directory outside the project."""
    (folder / "tmp").mkdir()
    env = os.environ | {"TMPDIR": str(folder / "tmp"), "MODE": mode}
    result = subprocess.run(
        prepare(folder, **changes), cwd=folder, env=env, capture_output=True, text=True, timeout=200
    )
    assert list((folder / "tmp").glob("neox_run_*")) == [], "the run's folder is removed"
    return result


@pytest.mark.parametrize("launcher", ["fork", "torchrun"])
def test_ranks_know_their_place(tmp_path: Path, launcher: str) -> None:
    result = launch(tmp_path, "places", launcher=launcher, model_parallel_size=2)
    assert result.returncode == 0, result.stderr
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["0 0 0 0 cpu", "0 0 1 1 cpu"]


def test_ranks_neither_load_the_compiler_nor_collect_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only imports of megatron-core and DeepSpeed load the compiler, for a third of a start's CPU time; to visit the
    objects of all imports in garbage collections takes as much."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    result = launch(tmp_path, "imports")
    assert result.returncode == 0, result.stderr
    assert "compiler loaded: False" in result.stdout
    frozen = re.search(r"exempt from collection: (\d+)", result.stdout)
    assert frozen is not None, "garbage is collected again"
    assert int(frozen[1]) > 200_000


@pytest.mark.parametrize(
    ("mode", "code", "said", "unsaid"),
    [
        pytest.param(
            "user-all", 2, ["error: the sky is too cloudy"], ["Traceback", "ended with"], marks=pytest.mark.slow
        ),
        ("user-one", 2, ["error: the sky is too cloudy"], ["Traceback", "ended with", "rank 0"]),
        ("bug", 1, ["rank 1 failed:", "Traceback", "failed: KeyError: 'telescope'"], ["rank 0"]),
        ("killed", 137, ["was killed by SIGKILL"], ["Traceback", "rank 0"]),
        pytest.param("code", 7, ["ended with exit code 7"], ["Traceback", "rank 0"], marks=pytest.mark.slow),
    ],
)
def test_a_failure_is_reported_once(tmp_path: Path, mode: str, code: int, said: list[str], unsaid: list[str]) -> None:
    result = launch(tmp_path, mode)
    assert result.returncode == code, result.stderr
    for text in said:
        assert result.stderr.count(text) == 1, result.stderr
    for text in unsaid:
        assert text not in result.stderr, result.stderr
    assert result.stderr.splitlines()[-1].startswith("deepy.py: "), "nothing follows the reason"
    assert said[-1] in result.stderr.splitlines()[-1]


def test_the_error_page_of_torchrun_is_not_printed(tmp_path: Path) -> None:
    result = launch(tmp_path, "user-one", launcher="torchrun")
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("the sky is too cloudy") == 1
    assert "Traceback" not in result.stderr
    assert "ChildFailedError" not in result.stderr


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("launcher", "deadly", "code"),
    [
        pytest.param("fork", signal.SIGINT, 130, marks=pytest.mark.slow),
        ("fork", signal.SIGTERM, 143),
        ("fork", signal.SIGKILL, -9),
        pytest.param("torchrun", signal.SIGINT, 130, marks=pytest.mark.slow),
        ("torchrun", signal.SIGKILL, -9),
    ],
)
def test_no_rank_outlives_deepy(tmp_path: Path, launcher: str, deadly: signal.Signals, code: int) -> None:
    log = (tmp_path / "output").open("w")
    words, env = prepare(tmp_path, launcher=launcher), os.environ | {"MODE": "sleep"}
    process = subprocess.Popen(words, stdout=log, stderr=log, cwd=tmp_path, env=env)
    try:
        files = [tmp_path / str(rank) for rank in range(2)]
        wait_until(
            lambda: all(file.exists() and file.read_text() for file in files),
            "the ranks",
            150,
            process,
            (tmp_path / "output").read_text,
        )
        pids = [int(file.read_text()) for file in files]
        assert all(map(_alive, pids))
        process.send_signal(deadly)
        assert process.wait(timeout=60) == code
        wait_until(lambda: not any(map(_alive, pids)), f"the end of the ranks {pids}", 60)
    finally:
        process.kill()
    assert "Traceback" not in (tmp_path / "output").read_text()


def _initialize(rank: int, world_size: int, folder: str, keys_of_rank: list[dict]) -> Any:
    import torch.distributed as dist

    from megatron.parallel.process_groups import initialize

    dist.destroy_process_group()
    os.environ["NEOX_RENDEZVOUS"] = f"file://{folder}/rendezvous"
    args = NeoXArgs.from_dict(keys_of_rank[rank % len(keys_of_rank)], world_size)
    try:
        place = initialize(args)
    except ValueError as error:
        return str(error)
    dist.barrier()  # a rank that ends while others still connect their groups looks like a crash
    return place.pp_rank, place.dp_rank, place.tp_rank


def test_coordinates_are_pipe_data_tensor(tmp_path: Path) -> None:
    layout = keys(model_parallel_size=2, pipe_parallel_size=2)
    places = run_ranks(_initialize, 8, str(tmp_path), [layout])
    assert places == [(pipe, data, tensor) for pipe in range(2) for data in range(2) for tensor in range(2)]


def test_ranks_with_different_configurations_stop(tmp_path: Path) -> None:
    messages = run_ranks(_initialize, 2, str(tmp_path), [VALID, keys(seed=2)])
    assert all("the ranks hold different configurations" in message for message in messages)


@pytest.mark.parametrize("library", ["megatron-core", "DeepSpeed"])
def test_rank_numbering_of_every_library_is_checked(library: str) -> None:
    messages = run_ranks(_disagreeing, 4, library)
    assert any(f"for {library}" in message for message in messages), messages


def _disagreeing(rank: int, world_size: int, library: str) -> str:
    """The error for groups whose ranks are numbered in another order than this project's."""
    from functools import partial

    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron.engine.deepspeed_module import connect
    from megatron.parallel.place import Place
    from megatron.parallel.process_groups import form_groups

    args = NeoXArgs.from_dict(keys(model_parallel_size=1, pipe_parallel_size=2), world_size)
    try:
        if library == "megatron-core":
            original = parallel_state.initialize_model_parallel
            parallel_state.initialize_model_parallel = lambda **sizes: partial(original, **sizes)(
                order="tp-cp-ep-pp-dp"
            )
            form_groups(args)
        else:
            right = Place.of(args, rank, rank, torch.device("cpu"))
            connect(args, replace(right, pp_rank=right.dp_rank, dp_rank=right.pp_rank))
    except RuntimeError as error:
        dist.barrier()
        return str(error)
    dist.barrier()
    return ""


def _deepspeed_reads(rank: int, world_size: int, precision: str) -> dict[str, Any]:
    from deepspeed.runtime.config import DeepSpeedConfig

    args = NeoXArgs.from_dict(keys(precision=precision, gradient_clipping=0.7), world_size)
    config = DeepSpeedConfig(args.deepspeed_config)
    return {
        "clipping": config.gradient_clipping,
        "stage": config.zero_optimization_stage,
        "accumulation": config.grad_accum_dtype,
        "bf16": config.bfloat16_config.enabled,
        "fp16": config.float16_config.enabled,
        "batch": (config.train_batch_size, config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps),
    }


@pytest.mark.parametrize("precision", ["fp32", "bfloat16"])
def test_deepspeed_accepts_every_key_of_our_config(precision: str) -> None:
    """DeepSpeed 0.19 rejects unknown keys inside its mappings, so a misspelled key fails here."""
    assert run_ranks(_deepspeed_reads, 1, precision) == [
        {
            "clipping": 0.7,
            "stage": 1,
            "accumulation": "fp32" if precision == "bfloat16" else None,
            "bf16": precision == "bfloat16",
            "fp16": False,
            "batch": (8, 2, 4),
        }
    ]
