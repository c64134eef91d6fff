"""The search over layouts: valid according to NeoXArgs, complete, ordered, with reasons; and the guide's tables."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import planner as benchmark
from benchmarks.published_runs import LLAMA_8B, LLAMA_70B, RUNS
from megatron.common.errors import ConfigError
from megatron.layout import LlamaShape
from megatron.neox_arguments import NeoXArgs
from megatron.planner.cost.estimate import estimate
from megatron.planner.cost.machines import FRONTIER, LUMI
from megatron.planner.cost.memory import plan_memory
from megatron.planner.cost.parallel_layout import ParallelLayout
from megatron.planner.search import SearchResult, search
from tests.support.configurations import keys

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs/llama31_70b"


@pytest.fixture(scope="module")
def found() -> SearchResult:
    return benchmark.searched(512)


def accepted(layout: ParallelLayout, base: dict[str, Any]) -> NeoXArgs:
    return NeoXArgs.from_dict(
        base
        | {
            "model_parallel_size": layout.tensor,
            "pipe_parallel_size": layout.pipe,
            "train_micro_batch_size_per_gpu": layout.micro_batch,
            "gradient_accumulation_steps": layout.num_micro_batches,
            "train_batch_size": layout.global_batch,
            "checkpoint_activations": layout.recompute == "full",
            "recompute_layers": layout.recompute_layers,
            "sequence_parallel": layout.sequence_parallel,
            "engine": layout.engine,
            "virtual_pipe_parallel_size": layout.virtual_stages,
            **({"recompute": "selective"} if layout.recompute == "selective" else {}),
        },
        world_size=layout.world_size,
    )


def test_every_layout_of_the_70b_is_accepted_by_the_trainer(found: SearchResult) -> None:
    replaced = (
        "model_parallel_size",
        "pipe_parallel_size",
        "train_micro_batch_size_per_gpu",
        "train_batch_size",
        "checkpoint_activations",
        "num_nodes",
        "num_gpus",
    )
    files = [CONFIGS / name for name in ("model.yml", "cpt.yml", "frontier.yml")]
    merged = NeoXArgs.from_ymls(files, world_size=2048).merged
    base = {key: value for key, value in merged.items() if key not in replaced}
    for candidate in found.ranked + found.lost:
        args = accepted(candidate.layout, base)
        assert ParallelLayout.of(args) == candidate.layout
        assert args.shape == candidate.estimate.shape


def test_no_layout_that_the_trainer_accepts_is_missed() -> None:
    """12 ranks, 16 sequences: all sizes are tried with NeoXArgs, independently of the search. The search considers only
    virtual stages of equal length, and recomputation under megatron-core only if it is needed."""
    base = keys(train_micro_batch_size_per_gpu=None, gradient_accumulation_steps=None, num_layers=6, vocab_size=4000)
    base["make_vocab_size_divisible_by"] = 128
    shape = NeoXArgs.from_dict(base | {"train_micro_batch_size_per_gpu": 1}, world_size=1).shape
    result = search(shape, 12, 16, 256, FRONTIER, vocab_divisible_by=128)
    ours = {candidate.layout for candidate in result.ranked + result.lost}
    theirs = set()
    assert not result.lost
    ways = [("deepspeed", 1, "none"), ("deepspeed", 1, "full"), *(("megatron", v, "none") for v in range(1, 7))]
    sizes = itertools.product(range(1, 13), range(1, 13), range(1, 17), range(1, 17), ways, (False, True))
    for tensor, pipe, micro_batch, steps, (engine, virtual, recompute), sliced in sizes:
        layout = ParallelLayout(
            tensor,
            pipe,
            12 // (tensor * pipe),
            micro_batch,
            steps,
            recompute,  # type: ignore[arg-type]
            sequence_parallel=sliced,
            engine=engine,  # type: ignore[arg-type]
            virtual_stages=virtual,
        )
        if layout.world_size != 12 or layout.global_batch != 16 or (virtual > 1 and 6 % (pipe * virtual)):
            continue
        with contextlib.suppress(ConfigError):
            theirs.add(ParallelLayout.of(accepted(layout, base)))
    assert ours == theirs
    assert len(ours) > 20
    assert {layout.sequence_parallel for layout in ours} == {False, True}
    assert {layout.data for layout in ours} == {1, 2, 4}  # 3, 6 and 12 do not divide 16
    assert {layout.pipe for layout in ours} == {3, 6}  # 12 needs 12 layers
    assert {layout.virtual_stages for layout in ours if layout.engine == "megatron"} == {1}


def test_padding_follows_the_tensor_parallel_size() -> None:
    shape = replace(LLAMA_8B, vocab_size=128_200, padded_vocab_size=128_256)
    result = search(shape, 8, 8, 2048, FRONTIER, vocab_divisible_by=128)
    sizes = {c.layout.tensor: c.estimate.shape.padded_vocab_size for c in result.ranked + result.lost}
    assert sizes == {1: 128_256, 2: 128_256, 4: 128_512, 8: 129_024}


def test_ranked_fit_and_stand_in_order(found: SearchResult) -> None:
    speeds = [candidate.tokens_per_second for candidate in found.ranked]
    assert speeds == sorted(speeds, reverse=True)
    for candidate in found.ranked:
        peak = max(stage.peak for stage in plan_memory(LLAMA_70B, candidate.layout, 8192))
        assert candidate.peak_bytes == peak <= FRONTIER.usable_hbm_bytes
        time = estimate(LLAMA_70B, candidate.layout, 8192, FRONTIER)
        assert candidate.tokens_per_second == time.tokens_per_second
    assert all(candidate.peak_bytes > FRONTIER.usable_hbm_bytes for candidate in found.lost)
    assert {candidate.layout.global_batch for candidate in found.ranked + found.lost} == {512}
    assert {candidate.layout.world_size for candidate in found.ranked + found.lost} == {2048}


def test_every_layout_has_a_reason(found: SearchResult) -> None:
    assert found.best is found.ranked[0]
    assert found.best.reason == "the fastest that fits"
    assert all(candidate.reason for candidate in found.ranked)
    for candidate in found.lost:
        assert f"needs {candidate.peak_bytes / 2**30:.1f} of 57 GiB" in candidate.reason
    assert found.find(8, 8, 1).reason.startswith("bubble 26%")  # type: ignore[union-attr]
    assert any(candidate.reason == "computes the forward of every layer twice" for candidate in found.ranked)
    short = next(c for c in found.of_engine("deepspeed") if c.layout.pipe == 8 and c.layout.num_micro_batches == 8)
    assert short.reason.startswith("bubble")
    assert "8 micro-batches through 8 stages" in short.reason


@pytest.mark.parametrize("batch", [512, 1024])
def test_better_layouts_than_astrosages_at_the_same_batch(batch: int) -> None:
    """DeepSpeed's fastest layout is sequence-parallel without recomputation; the fastest without recomputes less."""
    found = benchmark.searched(batch)
    astrosage, best = found.find(8, 8, 1), found.of_engine("deepspeed")[0]
    assert astrosage in found.ranked
    assert best.layout.sequence_parallel
    assert best.layout.recompute == "none"
    whole = [candidate for candidate in found.of_engine("deepspeed") if not candidate.layout.sequence_parallel]
    assert whole[0].layout.recompute_layers is not None
    speeds = [candidate.tokens_per_second for candidate in (best, whole[0], astrosage)]  # type: ignore[union-attr]
    assert speeds == sorted(speeds, reverse=True)


def test_only_sequences_that_ranks_can_divide_are_cut() -> None:
    odd, even = (search(LLAMA_8B, 8, 8, seq, FRONTIER, usable_bytes=2**40) for seq in (2050, 2048))
    for result, ranks in ((odd, {2}), (even, {2, 4, 8})):
        cut = [c.layout.tensor for c in result.ranked if c.layout.sequence_parallel]
        assert set(cut) == ranks


def test_virtual_stages_are_ranked_with_the_rest(found: SearchResult) -> None:
    """More virtual stages fill the pipeline faster. Only what megatron-core allows is listed: micro-batches in
    multiples of the stages, and chunks of whole layers."""
    sizes = {"micro_batch": 1, "recompute": "none", "sequence_parallel": True}
    by_virtual = [found.find(8, 8, **sizes, engine="megatron", virtual_stages=v) for v in (1, 2, 5, 10)]  # type: ignore[arg-type]
    speeds = [candidate.tokens_per_second for candidate in by_virtual if candidate]
    assert len(speeds) == 4
    assert speeds == sorted(speeds)
    deepspeed = found.find(8, 8, **sizes)  # type: ignore[arg-type]
    assert deepspeed is not None
    assert deepspeed.tokens_per_second < speeds[0]
    for candidate in found.ranked + found.lost:
        layout = candidate.layout
        if layout.virtual_stages > 1:
            assert layout.engine == "megatron"
            assert layout.num_micro_batches % layout.pipe == 0
            assert 80 % (layout.pipe * layout.virtual_stages) == 0
        assert layout.engine == "megatron" or not (layout.overlap_grad_reduce or layout.recompute == "selective")


def test_the_figures_of_interleaved_yml_are_the_planners(found: SearchResult) -> None:
    text = " ".join((CONFIGS / "interleaved.yml").read_text().replace("\n# ", " ").split())
    files = [CONFIGS / name for name in ("model.yml", "cpt.yml", "interleaved.yml")]
    layout = ParallelLayout.of(NeoXArgs.from_ymls(files, {"checkpoint_activations": False}))
    planned = next(candidate for candidate in found.ranked if candidate.layout == layout)
    time = planned.estimate
    exposed = time.tokens_per_step / time.exposed_step_seconds / 2048
    speed = (
        f"{time.tokens_per_second_per_gcd:.1f} with reduction and gather hidden behind computation, {exposed:.1f} with"
    )
    assert speed in text
    astrosage, deepspeed = found.find(8, 8, 1), found.of_engine("deepspeed")[0]
    assert astrosage is not None
    others = [f"{one.estimate.tokens_per_second_per_gcd:.1f}" for one in (astrosage, deepspeed)]
    assert f"AstroSage-70B's layout {others[0]}, the best under engine: deepspeed {others[1]}" in text
    assert f"holds {planned.peak_bytes / 2**30:.1f} GiB of 57" in text
    fallback = found.find(8, 8, 1, "none", True)
    assert fallback is not None
    assert f"predicted at {fallback.estimate.tokens_per_second_per_gcd:.1f} tokens/s" in text
    assert f"from 44 % of the busy time to {100 * time.bubble:.0f} %" in text


def test_the_table_shows_the_best_of_the_other_engine_too(found: SearchResult) -> None:
    assert found.best is not None
    assert found.best.layout.engine == "megatron"
    best = found.of_engine("deepspeed")[0]
    assert best not in found.ranked[:3]
    lines = found.lines(top=3)
    shown = lines[lines.index("the fastest with engine: deepspeed:") + 2].split()
    assert shown[:2] == ["deepspeed", str(best.layout.tensor)]


def test_recomputing_no_more_than_needed(found: SearchResult) -> None:
    """Layouts store as much as fits: recomputing one layer less would not fit, recomputing all would be slower."""
    partly = [candidate for candidate in found.ranked if candidate.layout.recompute_layers is not None]
    assert {candidate.layout.engine for candidate in partly} == {"deepspeed", "megatron"}
    for candidate in partly:
        layout = candidate.layout
        sizes = (layout.tensor, layout.pipe, layout.micro_batch)
        rest = (layout.sequence_parallel, layout.engine, layout.virtual_stages)
        full, none = found.find(*sizes, "full", *rest), found.find(*sizes, "none", *rest)
        assert full in found.ranked
        assert none in found.lost
        fewer = (layout.recompute_layers or 0) - 1
        less = replace(layout, recompute_layers=fewer) if fewer else replace(layout, recompute="none")
        stages = plan_memory(LLAMA_70B, less, 8192)
        assert max(stage.peak for stage in stages) > FRONTIER.usable_hbm_bytes >= candidate.peak_bytes
        assert full.tokens_per_second < candidate.tokens_per_second < none.tokens_per_second  # type: ignore[union-attr]


def test_less_memory_leaves_fewer() -> None:
    roomy, tight, nothing = (search(LLAMA_8B, 8, 8, 8192, FRONTIER, usable_bytes=gib * 2**30) for gib in (57, 28, 1))
    ours, theirs = (
        {c.layout for c in r.of_engine("deepspeed") if c.layout.recompute_layers is None} for r in (tight, roomy)
    )
    assert ours < theirs
    lost = [sum(c.layout.engine == "deepspeed" for c in r.lost) for r in (tight, roomy)]
    assert len(ours) + lost[0] == len(theirs) + lost[1]
    assert nothing.best is None
    assert nothing.lines()[0] == "no layout fits 1 GiB a GCD"


def test_heads_and_nodes_bound_tensor_parallelism() -> None:
    two_heads = LlamaShape(8, 1024, 2, 2, 2816, 4096, 4096, tied=False)
    result = search(two_heads, 16, 16, 2048, LUMI)
    assert {candidate.layout.tensor for candidate in result.ranked} == {1, 2}
    many = LlamaShape(8, 4096, 32, 32, 11_264, 32_000, 32_000, tied=False)
    assert max(candidate.layout.tensor for candidate in search(many, 16, 16, 2048, LUMI).ranked) == 8


def test_nothing_legal_is_an_error() -> None:
    with pytest.raises(ValueError, match="no layout of 7 GCDs fits a global batch of 3 sequences"):
        search(replace(LLAMA_8B, num_layers=4), 7, 3, 2048, FRONTIER)


def test_json_holds_what_the_table_shows(found: SearchResult) -> None:
    shown = json.loads(json.dumps(found.as_json(top=2)))
    assert [len(shown[name]) for name in ("ranked", "lost")] == [2, 2]
    assert ParallelLayout(**shown["ranked"][0]["layout"]) == found.ranked[0].layout
    assert shown["lost"][0]["reason"] == found.lost[0].reason


def test_lines_are_a_table(found: SearchResult) -> None:
    lines = found.lines(top=3)
    assert lines[0].split()[:4] == ["engine", "TP", "PP", "DP"]
    first = found.ranked[0].layout
    assert lines[1].split()[:7] == [
        *(first.engine, str(first.tensor), str(first.pipe), f"v{first.virtual_stages}"),
        *(str(number) for number in (first.data, first.micro_batch, first.num_micro_batches)),
    ]
    assert any("do not fit" in line for line in lines)


# --- published runs


def test_errors_against_published_runs() -> None:
    """Half are within 10 %; beyond 25 % are only runs with a doubtful number, for which the table gives the reason."""
    results = [benchmark.replay(run) for run in RUNS]
    errors = sorted(abs(result.error) for result in results)
    assert len(results) >= 10
    assert errors[len(errors) // 2] < 0.10
    assert all(result.run.caution for result in results if abs(result.error) > 0.25)


def test_the_machines_constants_are_the_calibrated_ones() -> None:
    assert benchmark.calibrate(RUNS) == {name: getattr(FRONTIER, name) for name in benchmark.FREE}
    assert all(getattr(FRONTIER, name) == getattr(LUMI, name) for name in benchmark.FREE)


def test_no_single_run_carries_the_calibration() -> None:
    outside = [result for result in benchmark.left_out(RUNS) if abs(result.error) > 0.25]
    assert all(result.run.caution for result in outside)


def test_replay_counts_what_the_run_counts() -> None:
    """TFLOP/s over tokens/s is the run's own FLOP formula; a GCD at half speed is at most twice as slow."""
    run = next(run for run in RUNS if run.name.startswith("AstroSage"))
    tflops = benchmark.replay(run).predicted
    tokens = benchmark.replay(replace(run, metric="tokens")).predicted
    assert tflops / tokens * 1e12 == pytest.approx(6.076e11, rel=1e-3)
    slow = benchmark.replay(replace(run, speed=0.5)).predicted
    assert tflops / 2 < slow < tflops


def test_the_guide_is_what_the_command_writes() -> None:
    guide = ROOT / "docs/planning.md"
    assert benchmark.fill(guide.read_text()) == guide.read_text(), (
        "run python benchmarks/planner.py --write docs/planning.md"
    )


def test_a_guide_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="published:begin"):
        benchmark.fill("# Planning a run\n")


def test_the_command(tmp_path: Path) -> None:
    guide = tmp_path / "planning.md"
    text = (ROOT / "docs/planning.md").read_text()
    assert "python benchmarks/planner.py --write docs/planning.md" in text
    guide.write_text(
        "before <!-- published:begin -->OUTDATED<!-- published:end --> <!-- search:begin --><!-- search:end --> after"
    )
    command = [sys.executable, "benchmarks/planner.py", "--write", str(guide), "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert "Absolute error: median" in done.stdout
    written = guide.read_text()
    assert "OUTDATED" not in written
    assert written.startswith("before <!-- published:begin -->\n| run |")
    assert written.endswith("<!-- search:end --> after")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures["runs"]) == len(RUNS)
    assert figures["search"]["512"]["ranked"][0]["layout"]["tensor"] == 8
