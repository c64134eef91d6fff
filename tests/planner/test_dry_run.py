"""`deepy.py --dry-run`: stages of the real model, a plan without hardware or data, and helpful errors."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron.neox_arguments import NeoXArgs
from megatron.planner.cost.checkpoint_size import checkpoint_size
from megatron.planner.cost.memory import default_stages, plan_memory
from megatron.planner.cost.parallel_layout import ParallelLayout
from tests.support.models import Case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
ASTROSAGE = [f"configs/llama31_70b/{name}.yml" for name in ("model", "cpt", "frontier")]


WORDS = ["--dry-run", "--paths-on-nodes"]


def dry_run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "deepy.py", "train.py", *words, *WORDS]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def _dry_runs(rank: int, world_size: int, runs: list[list[str]]) -> list[tuple[int, str, str]]:
    import torch.distributed as dist

    from megatron.launcher.command_line import main

    dist.destroy_process_group()
    os.chdir(ROOT)
    ended = []
    for words in runs:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["train.py", *words, *WORDS])
        ended.append((code, out.getvalue(), err.getvalue()))
    return ended


def dry_runs(*runs: list[str]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of dry runs without the imports, which take longest."""
    return run_ranks(_dry_runs, 1, list(runs))[0]


def test_the_70b_on_2048_gcds(tmp_path: Path) -> None:
    done = dry_run(*ASTROSAGE, "--json", "--token-budget", "165e9", "--picture", str(tmp_path / "plan.png"))
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["world_size"] == 2048
    assert plan["parameters_total"] == 70_553_706_496
    assert len(plan["stages"]) == 8
    assert [layer for stage in plan["stages"] for layer in stage["layers"]] == list(range(85))
    assert [stage["decoder_layers"] for stage in plan["stages"]] == [10] * 8
    assert plan["stages"][3]["parameters"] == 1_069_711_360
    for stage in plan["stages"]:
        assert stage["peak"] == sum(stage["bytes"].values()) < plan["usable_bytes"]
    assert plan["checkpoint_bytes"] / 1e9 == pytest.approx(988, abs=0.5)
    assert plan["bubble"] == pytest.approx(7 / 16)
    assert set(plan["tflops_per_gcd"]) == {"neox", "megatron"}
    assert plan["tokens_per_second_per_gcd"] * plan["step_seconds"] * 2048 == pytest.approx(512 * 8192)
    assert plan["budget"]["steps"] == 39_340
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    # in KiB: no child of this process used 4 GiB
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 << 20


def test_a_plan_for_people_and_a_picture_as_text(tmp_path: Path) -> None:
    tiny = [f"configs/tiny/{name}.yml" for name in ("model", "run", "local")]
    ((code, printed, errors),) = dry_runs([*tiny, "--precision", "bfloat16", "--picture", str(tmp_path / "plan.svg")])
    assert code == 0, errors
    assert "1,787,008 parameters on 8 ranks: TP 2 x PP 2 x DP 2, bfloat16" in printed
    assert "MiB" in printed
    assert "fits: at most" in printed
    picture = (tmp_path / "plan.svg").read_text()
    for label in ("stage", "idle: ", "weights", "gradients"):
        assert label in picture


def test_an_oversized_plan_is_rejected_with_alternatives() -> None:
    words = [*ASTROSAGE, "--checkpoint_activations", "false"]
    (code, printed, errors), allowed = dry_runs(words, [*words, "--json", "--allow-memory"])
    assert code == 2
    assert "DOES NOT FIT" in printed
    message = errors.splitlines()[-1]
    assert message.startswith("deepy.py: this run does not fit: stage 0 needs ")
    assert "57.0 GiB can be used on frontier" in message
    assert "What would fit: sequence_parallel: true (" in message
    assert "or checkpoint_activations: true with recompute_layers: 4 (" in message
    assert "or checkpoint_activations: true (" in message
    assert allowed[0] == 0
    assert json.loads(allowed[1])["fits"] is False


def _true_stages(rank: int, world_size: int, configs: list[str], overrides: dict[str, Any], ranks: int) -> Any:
    import torch.distributed as dist

    from megatron.planner.cost import stages

    dist.destroy_process_group()
    args = NeoXArgs.from_ymls(configs, overrides=overrides, world_size=ranks, task="model")
    return [(stage.chunks, stage.parameters, stage.parameters_total) for stage in stages.true_stages(args)]


@pytest.mark.parametrize(
    ("model", "tp", "pp", "method", "parameters"),
    [
        ("llama31_8b", 8, 2, "type:transformer|mlp", 8_030_261_248),
        ("llama31_8b", 4, 5, "type:transformer|mlp", 8_030_261_248),
        ("llama31_8b", 2, 3, "parameters", 8_030_261_248),
        ("llama32_1b", 4, 2, "type:transformer|mlp", 1_235_814_400),  # tied
        ("llama32_1b", 1, 1, "type:transformer|mlp", 1_235_814_400),
    ],
)
def test_stages_of_the_true_model(model: str, tp: int, pp: int, method: str, parameters: int) -> None:
    """Parameters sum to the published number, and the formula assigns layers to stages like DeepSpeed."""
    sizes = {"model_parallel_size": tp, "pipe_parallel_size": pp, "pipe_partition_method": method}
    configs = [str(CONFIGS / model / "model.yml")]
    stages = run_ranks(_true_stages, 1, configs, sizes, 4 * tp * pp)[0]
    assert sum(total for _, _, total in stages) == parameters
    args = NeoXArgs.from_ymls(configs, overrides=sizes, world_size=4 * tp * pp, task="model")
    layers = [layers for (layers,), _, _ in stages]
    if method.startswith("type:"):
        assert default_stages(args.num_layers, pp) == layers
    layout = ParallelLayout(tp, pp, data=4, micro_batch=1, num_micro_batches=8)
    planned = plan_memory(args.shape, layout, 128, stage_layers=layers)
    assert [stage.parameters for stage in planned] == [own for _, own, _ in stages]


@pytest.mark.parametrize(
    "virtual", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 5]
)
def test_virtual_stages_of_the_70b_on_2048_ranks(virtual: int) -> None:
    """With all groups and virtual stages built, the parameters sum to the published number and equal the formula's on
    every rank; the plan has their fp32 gradients and masters."""
    sizes = {
        "model_parallel_size": 8,
        "pipe_parallel_size": 8,
        "sequence_parallel": True,
        "engine": "megatron",
        "virtual_pipe_parallel_size": virtual,
    }
    configs = [str(CONFIGS / "llama31_70b" / "model.yml")]
    stages = run_ranks(_true_stages, 1, configs, sizes | {"seq_length": 8192}, 2048)[0]
    assert sum(total for _, _, total in stages) == 70_553_706_496
    runs = [stages[stage][0][number] for number in range(virtual) for stage in range(8)]
    assert runs == default_stages(80, 8 * virtual)
    args = NeoXArgs.from_ymls(configs, overrides=sizes | {"seq_length": 8192}, world_size=2048, task="model")
    layout = ParallelLayout(8, 8, 32, 1, 16, "none", None, True, "megatron", virtual, True, True)
    planned = plan_memory(args.shape, layout, 8192, stage_layers=runs)
    assert [stage.parameters for stage in planned] == [own for _, own, _ in stages]
    assert [stage.parameters for stage in planned] == [1_201_045_504, *[1_069_711_360] * 6, 1_201_053_696]
    for stage in planned:
        assert stage.weights == pytest.approx(2 * stage.parameters, rel=1e-6)
        assert stage.gradients == pytest.approx(4 * stage.parameters, rel=1e-6)
        assert stage.optimizer == pytest.approx(12 * stage.parameters / 32, rel=1e-6)


def _wrong_table(rank: int, world_size: int) -> str:
    import torch.distributed as dist

    from megatron.planner.cost import stages

    dist.destroy_process_group()
    right = stages.layout.rank_shape
    stages.layout.rank_shape = lambda row, shape, tp: (*right(row, shape, tp)[:-1], 7)  # type: ignore[assignment]
    args = NeoXArgs.from_ymls([CONFIGS / "tiny" / "model.yml"], overrides={"model_parallel_size": 2}, task="model")
    try:
        stages.true_stages(args)
    except stages.StageMismatchError as error:
        return str(error)
    return ""


def test_a_model_that_is_not_the_layout_tables_is_refused() -> None:
    assert "stage 0, layer 0: word_embeddings.weight is (2048, 128), not (2048, 7)" in run_ranks(_wrong_table, 1)[0]


SAVED = Case(heads=8, kv_heads=2, head_dim=32, layers=4, intermediate=704, vocab=1024, seq=16)


def _save(rank: int, world_size: int, case: Case, keys: dict[str, Any], folder: str) -> int:
    """Save a checkpoint; returns the bytes in its folder."""
    from megatron.checkpoint.save import save_checkpoint
    from megatron.checkpoint.state import TrainState
    from megatron.engine.build import build_engine
    from megatron.parallel.process_groups import form_groups
    from tests.support.engine_runs import make_samples, step

    args = case.neox(world_size=world_size, save=folder, checkpoint_factor=1, **keys)
    engine = build_engine(args, form_groups(args))
    engine.initialize_weights()
    step(engine, args, make_samples(case, args.train_batch_size))
    saved = save_checkpoint(engine, args, TrainState(iteration=1), data_fingerprints={})
    return sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())


@pytest.mark.parametrize("precision", ["bfloat16", "fp32"])
@pytest.mark.parametrize(("tp", "pp", "tied"), [(2, 1, False), (1, 2, True)])
def test_a_checkpoint_has_the_predicted_size_within_1_percent(
    precision: str, tp: int, pp: int, tied: bool, tmp_path: Path
) -> None:
    case = Case(**{**vars(SAVED), "tied": tied})
    keys = {"precision": precision, "model_parallel_size": tp, "pipe_parallel_size": pp}
    size = run_ranks(_save, 4, case, keys, str(tmp_path))[0]
    args = case.neox(world_size=4, **keys)
    predicted = checkpoint_size(args.shape, tp, precision)
    assert predicted.total == pytest.approx(size, rel=0.01)


def test_the_commands_of_the_guide(tmp_path: Path) -> None:
    """The planning commands of docs/planning.md; its benchmarks have their own tests."""
    guide = (ROOT / "docs" / "planning.md").read_text()
    commands = [line for block in re.findall(r"```bash\n(.*?)```", guide, re.DOTALL) for line in block.splitlines()]
    planned = [command for command in commands if command.startswith("python deepy.py train.py ")]
    assert len(planned) == 3
    runs = [command.replace("docs/plan_70b.png", str(tmp_path / "plan.png")).split()[3:] for command in planned]
    for code, printed, errors in dry_runs(*[[word for word in words if word != "--dry-run"] for words in runs]):
        assert code == 0, errors
        assert "70,553,706,496 parameters" in printed
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_the_benchmark_fills_the_guides_table(tmp_path: Path) -> None:
    """With one of its cases; its command in the guide runs all of them."""
    guide = tmp_path / "planning.md"
    guide.write_text((ROOT / "docs" / "planning.md").read_text())
    program = "import sys, benchmarks.planner_memory as b; b.CPU_CASES = (b.Case(pipe=2, seq=64),); sys.exit(b.main())"
    command = [sys.executable, "-c", program, "--device", "cpu", "--write", str(guide), "--json", str(tmp_path / "j")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    between = guide.read_text().split("<!-- memory:begin -->")[1].split("<!-- memory:end -->")[0]
    assert between.count("| TP1 PP2 DP1, 1 x 4, recomputed, bf16 |") == 2
    assert "Largest error of 2 stages on the CPU" in between
    assert len(json.loads((tmp_path / "j").read_text())) == 2
