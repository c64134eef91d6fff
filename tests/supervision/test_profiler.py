"""Traces requested by YAML or by a file are valid JSON and contain this project's operations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.supervision.profiler import ProfileRequest, RequestError, parse_request
from tests.support.models import Case
from tests.support.ranks import run_ranks
from tests.support.runs import run_case
from tests.support.token_files import random_documents

pytestmark = pytest.mark.distributed

CASE = Case(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=48, vocab=96, seq=16)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_documents(tmp_path_factory.mktemp("tokens") / "train", CASE.vocab)


def _run(rank: int, world_size: int, run_keys: dict[str, Any], drop: tuple[int, str] | None = None) -> None:
    """A run of two stages; before iteration `drop[0]` a request file with the text `drop[1]` appears."""
    from megatron.supervision import profiler
    from megatron.trainer.run import Run

    profiler.LOOK_SECONDS = 0.0

    class Dropping(Run):
        def train_step(self) -> None:
            if drop and rank == 0 and self.state.iteration + 1 == drop[0]:
                (Path(self.args.log_dir or "") / "profile.request").write_text(drop[1])
            super().train_step()

    run_case(CASE, world_size, {**run_keys, "kernels": "reference"}, Dropping)


def keys(data: str, folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "pipe_parallel_size": 2,
        "train_data_paths": [data],
        "train_iters": 6,
        "log_dir": str(folder),
        **changes,
    }


def spans(path: Path) -> list[str]:
    return [event["name"] for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]


def test_steps_and_ranks_named_in_the_yaml(data: str, tmp_path: Path) -> None:
    profile = {"profile": True, "profile_step_start": 3, "profile_step_stop": 5, "profile_ranks": [1]}
    run_ranks(_run, 2, keys(data, tmp_path, **profile))
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["iterations_3-4_rank_1.json"]
    names = spans(tmp_path / "profile/iterations_3-4_rank_1.json")
    assert names.count("optimizer") == 2, "two steps"
    assert names.count("forward") == 4, "of two micro-batches each"
    for ours in ("_AddRmsNorm", "_CrossEntropy", "_Rotary"):
        assert sum(name == ours for name in names) >= 4, ours
    assert any("scaled_dot_product" in name for name in names)


def test_a_dropped_file_asks_for_a_trace(data: str, tmp_path: Path) -> None:
    run_ranks(_run, 2, keys(data, tmp_path), (3, "steps: 1\nranks: [0, 1]\n"))
    names = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert names == ["iterations_4-4_rank_0.json", "iterations_4-4_rank_1.json"]
    assert spans(tmp_path / "profile/iterations_4-4_rank_0.json").count("optimizer") == 1
    assert not (tmp_path / "profile.request").exists()


def test_a_trace_that_the_end_of_the_run_cuts_is_written(data: str, tmp_path: Path) -> None:
    run_ranks(_run, 2, keys(data, tmp_path), (4, "steps: 50"))
    assert spans(tmp_path / "profile/iterations_5-54_rank_0.json").count("optimizer") == 2


def test_a_malformed_request_does_not_stop_the_run(data: str, tmp_path: Path) -> None:
    (code, output), _ = run_ranks(_run, 2, keys(data, tmp_path), (3, "ranks: [7]"), expect_failure=True)
    assert code == 0
    assert "ranks is [7], expected a list of ranks from 0 to 1; the run continues without a profile" in output
    assert (tmp_path / "profile.request.refused").read_text() == "ranks: [7]"
    assert not (tmp_path / "profile").exists()


def test_requests() -> None:
    assert parse_request("", 7, 4) == ProfileRequest(7, 9, (0,))
    assert parse_request("steps: 3\nranks: [0, 3]", 7, 4) == ProfileRequest(7, 10, (0, 3))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: [", "not YAML"),
        ("12", "is not a mapping of steps and ranks"),
        ("step: 3", "is not a mapping of steps and ranks"),
        ("steps: 0", "steps is 0, expected a number from 1 to 100"),
        ("steps: many", "steps is 'many'"),
        ("steps: true", "steps is True"),
        ("ranks: []", "ranks is []"),
        ("ranks: [4]", "expected a list of ranks from 0 to 3"),
        ("ranks: 2", "ranks is 2"),
    ],
)
def test_requests_that_cannot_be_followed(text: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(text, 7, 4)
    assert said in str(caught.value)
