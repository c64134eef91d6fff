"""The table of exit codes in docs/reliability.md matches the program."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from megatron.common import boundary
from megatron.preflight import diagnosis
from megatron.supervision import failures

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_of_exit_codes() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text().split("## Exit codes")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| (\d+) \| ([^|]*)", text, re.MULTILINE))
    meaning = {
        boundary.DONE: "done",
        failures.FAILURE: "a defect",
        failures.USER_ERROR: "a user's error",
        diagnosis.STALLED: "do not arrive",
        diagnosis.SLOW: "slow nodes",
        diagnosis.SOCKETS: "TCP",
        failures.REQUEUE: "stopped by SIGUSR1, SIGTERM or Ctrl-C, everything saved",
        failures.LOST: "ranks died",
        128 + signal.SIGINT: "Ctrl-C",
    }
    assert rows.keys() == {str(code) for code in meaning}
    for code, words in meaning.items():
        assert words in rows[str(code)]
    assert (boundary.USER_ERROR, boundary.DEFECT) == (failures.USER_ERROR, failures.FAILURE)
    assert diagnosis.CONFIGURATION == failures.USER_ERROR
    assert boundary.INTERRUPTED == 128 + signal.SIGINT
