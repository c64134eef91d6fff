"""The disk space that a run needs, in every precision."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron.neox_arguments import NeoXArgs
from megatron.preflight.run_inputs import input_problems
from tests.support.configurations import keys

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("precision", "weight"), [("fp32", 4), ("bfloat16", 2), ("fp16", 2)])
def test_a_checkpoint_has_to_find_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, weight: int
) -> None:
    args = NeoXArgs.from_dict(keys(precision=precision, save=str(tmp_path / "saves"), checkpoint_factor=5))
    needed = args.shape.num_parameters * (12 + weight)
    for free, said in ((needed * 2, False), (needed // 2, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        found = [problem for problem in input_problems(args) if problem.startswith("save: ")]
        assert bool(found) is said
        if said:
            assert f"one checkpoint of this model needs {needed / 1e9:,.3g} GB" in found[0]
