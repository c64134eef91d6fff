"""Prompts that are typed: which lines are prompts, and that the ranks' process gets them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron.generation.interactive import typed_prompts
from megatron.launcher.local import reads_input
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.rank_env import TYPED
from tests.support.configurations import keys

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


class Alone:
    """A world of one rank."""

    rank = 0

    def broadcast(self, value: Any) -> Any:
        return value


@pytest.mark.parametrize(
    ("typed", "prompts"),
    [
        (b"a star\n\n  \nZ\xc3\xbcrich \nstop\nnever\n", ["a star", "Zürich "]),
        (b"one\nSTOP\n", ["one"]),
        (b"no newline", ["no newline"]),
        (b"not \xff UTF-8\n", ["not \ufffd UTF-8"]),
        (b"", []),
    ],
)
def test_lines_are_prompts_until_stop_or_the_end(
    typed: bytes, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.write(writer, typed)
    os.close(writer)
    monkeypatch.setenv(TYPED, str(reader))
    group: Any = Alone()
    assert list(typed_prompts(group)) == prompts
    os.close(reader)


@pytest.mark.parametrize(("kind", "shown"), [("interactive", "typed"), ("unconditional", "")])
def test_only_an_interactive_program_gets_what_is_typed(kind: str, shown: str) -> None:
    args = NeoXArgs.from_dict(keys(from_scratch=None, load="x", text_gen_type=kind), task="generate")
    assert reads_input(args) == (kind == "interactive")
    program = (
        "import os, sys\nfrom megatron.launcher.local import supervise\n"
        f"sys.exit(supervise(['cat'], dict(os.environ), {reads_input(args)}))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, input="typed", capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, shown)
