"""The plan as text, JSON and error message, computed from formulas only, and the options after --dry-run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.common.picture_files import check_picture_file
from megatron.launcher import command_line
from megatron.neox_arguments import ConfigError, NeoXArgs
from megatron.planner.cost.machines import FRONTIER, GIB, LUMI
from megatron.planner.cost.memory import default_stages
from megatron.planner.front import report
from megatron.planner.front.options import PlanOptions, take_options
from megatron.planner.plan import Plan, find_machine, make_plan, refusal, remedies

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
ASTROSAGE = [f"configs/llama31_70b/{name}.yml" for name in ("model", "cpt", "frontier")]
TINY = [f"configs/tiny/{name}.yml" for name in ("model", "run", "local")]


def plan(usable: int | None = None, tokens: float | None = None, **overrides: object) -> Plan:
    args = NeoXArgs.from_ymls([ROOT / name for name in ASTROSAGE], overrides)
    stages = default_stages(args.num_layers, args.pipe_parallel_size)
    return make_plan(args, stages, args.shape.num_parameters, FRONTIER, usable, tokens)


def test_options_are_taken_and_keys_are_left() -> None:
    words = ["--json", "--train_iters", "5", "--machine=lumi", "--token_budget", "165e9", "--picture", "p.svg"]
    assert take_options(words) == PlanOptions(json=True, machine="lumi", token_budget=165e9, picture=Path("p.svg"))
    assert words == ["--train_iters", "5"]
    assert take_options([]) == PlanOptions()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--machine"], "--machine needs a value"),
        (["--usable-gib", "plenty"], "--usable-gib: 'plenty' is not a positive number"),
        (["--token-budget=-3"], "--token-budget: '-3' is not a positive number"),
    ],
)
def test_a_mistaken_option_is_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        take_options(words)


def test_a_machine_or_a_picture_that_cannot_be() -> None:
    assert find_machine("lumi") is LUMI
    with pytest.raises(ConfigError, match="'summit' is not known; known: frontier, lumi"):
        find_machine("summit")
    with pytest.raises(ConfigError, match=r"plan.jpg must end in one of .png, .svg, .pdf"):
        check_picture_file(Path("plan.jpg"), ConfigError)
    with pytest.raises(ConfigError, match="there is no folder"):
        check_picture_file(Path("nowhere/plan.png"), ConfigError)


def test_only_a_training_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=r"not eval\.py; give train\.py"):
        command_line.parse_command_line(["eval.py", *TINY, "--dry-run"])
    request = command_line.parse_command_line(["train.py", *TINY, "--dry-run", "--search", "--train_iters", "3"])
    assert request.plan == PlanOptions(search=True)
    assert request.overrides == {"train_iters": 3}
    assert command_line.parse_command_line(["train.py", *TINY]).plan is None


def test_an_option_of_the_plan_alone_is_an_unknown_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    request = command_line.parse_command_line(["train.py", *TINY, "--allow_memory", "true"])
    with pytest.raises(ConfigError, match="allow_memory"):
        NeoXArgs.from_ymls(request.configs, request.overrides)


def test_unused_modules_are_not_imported() -> None:
    program = (
        "import sys; from megatron.launcher.command_line import main; "
        f"code = main(['train.py', *{TINY}, '--print-config']); "
        "loaded = [m for m in sys.modules if m == 'torch' or m.startswith('megatron.planner')]; "
        "sys.exit(f'imported {loaded}' if loaded else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_json_holds_what_it_promises() -> None:
    shown = json.loads(json.dumps(plan(tokens=165e9).as_json()))
    assert shown["parameters_total"] == 70_553_706_496
    assert shown["layout"] | {"tensor": 8, "pipe": 8, "data": 32} == shown["layout"]
    assert shown["tokens_per_step"] == 512 * 8192
    assert shown["fits"] is True
    assert sum(shown["step_parts"].values()) == pytest.approx(shown["step_seconds"])
    assert shown["checkpoint"]["weights"] + shown["checkpoint"]["optimizer"] == shown["checkpoint_bytes"]
    assert shown["budget"]["tokens"] == 165e9
    assert {"stage", "layers", "decoder_layers", "parameters", "bytes", "peak", "moment"} <= set(shown["stages"][0])


def test_the_text_has_every_stage_and_both_formulas() -> None:
    text = report.text(plan())
    assert "2,048 ranks (256 nodes of 8): TP 8 x PP 8 x DP 32" in text
    for stage in plan().stages:
        assert f"{stage.layers[0]}-{stage.layers[-1]}" in text
        assert f"{stage.peak / GIB:.2f}" in text
    assert "GPT-NeoX's formula (HFU" in text
    assert "by Megatron's (MFU" in text
    assert "…" not in text, "a column was cut"
    assert max(map(len, text.splitlines()[4:16])) <= report.WIDTH


def test_a_layout_for_people_does_not_depend_on_the_number_of_stages() -> None:
    assert "…" not in report.text(plan(pipe_parallel_size=64))


def test_a_refusal_says_where_how_much_and_what_would_fit() -> None:
    refused = plan(checkpoint_activations=False)
    assert not refused.fits
    message = refusal(refused)
    assert f"stage 0 needs {refused.stages[0].peak / GIB:.1f} GiB" in message
    assert "of which 57.0 GiB can be used on frontier" in message
    assert "Most of it: activations" in message
    fitting = [what for what, peak in remedies(refused) if peak <= refused.usable_bytes]
    assert fitting
    assert f"What would fit: {fitting[0]} (" in message


def test_suggested_layouts_do_fit() -> None:
    refused = plan(checkpoint_activations=False)
    said = dict(remedies(refused))
    assert said["checkpoint_activations: true"] == plan().fullest.peak
    assert said["sequence_parallel: true"] == plan(sequence_parallel=True, checkpoint_activations=False).fullest.peak
    deeper = plan(checkpoint_activations=True, pipe_parallel_size=16)
    assert said["checkpoint_activations: true with pipe_parallel_size: 16"] == deeper.fullest.peak


def test_faster_layouts_in_the_same_memory_are_named_with_their_gain() -> None:
    lines = report.text(plan()).splitlines()
    gains = [
        (found[1], float(found[2])) for line in lines if (found := re.match(r"(.*) would fit too: (.*)% tok", line))
    ]
    assert [what for what, _ in gains] == [
        "recompute_layers: 4",
        "sequence_parallel: true with checkpoint_activations: false",
    ]
    for (_, gain), keys in zip(
        gains, ({"recompute_layers": 4}, {"sequence_parallel": True, "checkpoint_activations": False}), strict=True
    ):
        other = plan(**keys)
        assert other.fits
        assert gain == pytest.approx(100 * (other.time.tokens_per_second / plan().time.tokens_per_second - 1), abs=0.51)
    assert "would fit too" not in report.text(plan(sequence_parallel=True, checkpoint_activations=False))


def test_a_plan_with_sequence_parallelism_says_so() -> None:
    text = report.text(plan(sequence_parallel=True, checkpoint_activations=False))
    assert "bfloat16, nothing recomputed, sequence parallel\n" in text
    assert re.search(r"overlapping collectives with products could save [45]\.\d% of the step; not subtracted", text)


def test_where_nothing_fits_the_search_is_pointed_to() -> None:
    assert "--search tries all layouts" in refusal(plan(usable=5 * GIB))


def test_the_guide_shows_the_present_plan() -> None:
    """The table in docs/planning.md equals the plan line by line."""
    guide = (ROOT / "docs" / "planning.md").read_text()
    text = report.text(plan())
    table = text[text.index("memory of one rank") : text.index("\nrecompute_layers")]
    assert table in guide, "put the present output of the guide's first command into it"


def test_the_guide_explains_every_option() -> None:
    guide = (ROOT / "docs" / "planning.md").read_text()
    for option in ("--json", "--machine", "--usable-gib", "--allow-memory", "--token-budget", "--search", "--picture"):
        assert f"`{option}" in guide
        assert option in command_line.USAGE


def test_saves_beside_training_cost_a_copy() -> None:
    """The 70B's largest rank copies 0.45 GB of masters and moments and one layer file at 36 GB/s."""
    waiting, beside = plan(async_save=False), plan(async_save=True)
    assert waiting.reliability.save_seconds == pytest.approx(987.9e9 / 100e9, rel=1e-3)
    assert 0.45e9 / 36e9 < beside.reliability.save_seconds < 0.75e9 / 36e9
    assert beside.reliability.lost_to_saves < waiting.reliability.lost_to_saves / 10
    assert beside.reliability.save_interval >= beside.time.checkpoint_seconds
    assert "during training, which waits 0.0" in report.text(beside)
