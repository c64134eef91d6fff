"""benchmarks/house.py on a source tree with hand-counted figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.house import class_collisions, figures, function_collisions, library, upward_edges

pytestmark = pytest.mark.unit

LOOP = """import deepspeed

from megatron import ops
from megatron.ops.norm import norm


class Plan:
    pass


def run():
    norm()
    ops.helper()


def _hidden():
    pass
"""
NORM = '''from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.trainer import loop


def norm():
    """One line.

    More.
    """
    return 1


def helper():
    pass


def local():
    pass
'''
OTHER = """class Plan:
    pass


def norm():
    pass


def helper():
    pass


def local():
    pass
"""
FILES = {
    "train.py": '"""Entry."""\nfrom megatron.trainer.loop import run\n\nrun()  # a comment\n',
    "megatron/trainer/__init__.py": '"""Trainer."""\n',
    "megatron/trainer/loop.py": LOOP,
    "megatron/ops/__init__.py": "from megatron.ops.norm import helper\n",
    "megatron/ops/norm.py": NORM,
    "tools/other.py": OTHER,
    "launch/render.py": "def _hidden():\n    pass\n",
    "tests/test_it.py": "def test():\n    assert True\n",
    "benchmarks/one.py": "def one():\n    pass\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_figures(tree: Path) -> None:
    found, _ = figures(tree, collection=False)
    assert found["library"] == {
        "files": 7,
        "code lines": 2 + 0 + 10 + 1 + 9 + 8 + 2,
        "median lines of a file": 4,
        "longest file": "20 (megatron/ops/norm.py)",
        "files under 60 lines": 7,
        "longest function": "6 (megatron/ops/norm.py:7 norm)",
    }
    assert found["tests"]["files"] == 1
    assert found["boundaries"] == {
        "upward package edges": 1,
        "files importing DeepSpeed": 1,
        "class-name collisions": 1,
        "function-name collisions": 2,
        "function names used twice": 3,
    }


def test_edges_and_names(tree: Path) -> None:
    ours = library(tree)
    assert upward_edges(ours) == {"megatron.ops -> megatron.trainer": ["megatron/ops/norm.py:4"]}
    assert class_collisions(ours) == {"Plan": ["megatron/trainer/loop.py", "tools/other.py"]}
    # `local` is not used elsewhere; `helper` is, through a package that re-exports it
    assert set(function_collisions(ours)) == {"norm", "helper"}
