"""The program behaves as at commit bcef1de, before its packages were restructured.

`recorded/` was written by `python -m tests.characterization.record` at that commit. A commit with an intended change of
a recorded value records it again and says so.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.characterization import observe
from tests.characterization.observe import FIRST_HALF, LAYOUTS, LOSS, NORM, STEPS
from tests.characterization.record import RECORDED

pytestmark = pytest.mark.distributed
SPLIT = "tp2_pp2_dp2"


def recorded(name: str) -> Any:
    return json.loads((RECORDED / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokens for all runs, checked against the recorded bytes."""
    folder = tmp_path_factory.mktemp("tokens")
    assert observe.make_tokens(folder) == recorded("tokens")
    return folder


def assert_same_steps(found: dict[str, Any], expected: dict[str, Any], first: int = 0) -> None:
    """Losses and norms within 1e-6; bit for bit if software and CPU are those of the recording."""
    exact = observe.machine() == recorded("runs")["machine"]
    for key in (LOSS, NORM):
        wanted = expected[key][first:]
        assert len(found[key]) == len(wanted) == STEPS - first
        assert found[key] == (wanted if exact else pytest.approx(wanted, rel=1e-6)), key


def test_configurations_resolve_as_before() -> None:
    """Keys that were added since then are allowed."""
    found = observe.printed_configurations()
    for name, expected in recorded("configurations").items():
        if isinstance(expected, int):
            assert found[name] == expected, name
        else:
            changed = {key: found[name].get(key) for key, value in expected.items() if found[name].get(key) != value}
            assert not changed, name


def test_the_plan_of_the_70b_is_as_before() -> None:
    assert observe.plan_of_the_70b() == recorded("plan_70b")


def test_converted_weights_are_byte_identical(tmp_path: Path) -> None:
    assert observe.converted(tmp_path) == recorded("converted")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_steps_are_as_before(tokens: Path, layout: str) -> None:
    folder = tokens / layout
    folder.mkdir()
    for path in tokens.glob("tok*"):
        shutil.copy(path, folder)
    found, expected = observe.train(folder, layout), recorded("runs")[layout]
    assert_same_steps(found, expected)
    checkpoint = folder / f"checkpoints/global_step{FIRST_HALF}"
    assert observe.manifest_keys(checkpoint)["provenance"] == recorded("checkpoint_keys")["manifest"]["provenance"]
    if layout == SPLIT:
        keys = {"manifest": observe.manifest_keys(checkpoint), "meta": observe.meta_keys(checkpoint)}
        assert keys == recorded("checkpoint_keys")
    if observe.machine() == recorded("runs")["machine"]:
        assert observe.weight_hashes(folder / f"checkpoints/global_step{STEPS}") == expected["weights"]


def test_a_checkpoint_written_then_resumes_to_the_same_bits(tokens: Path) -> None:
    folder = tokens / "resumed"
    folder.mkdir()
    for path in tokens.glob("tok*"):
        shutil.copy(path, folder)
    checkpoints = RECORDED / "checkpoints"
    found = observe.train(folder, SPLIT, "--load", checkpoints, "--from_scratch", "false")
    expected = recorded("runs")[SPLIT]
    assert_same_steps(found, expected, first=FIRST_HALF)
    if observe.machine() == recorded("runs")["machine"]:
        assert observe.weight_hashes(folder / f"checkpoints/global_step{STEPS}") == expected["weights"]
