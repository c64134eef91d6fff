"""The table of minutes: both reports are summed, and folders over or without a budget are marked."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.budget import FolderTime, read_reports, table

pytestmark = pytest.mark.unit

REPORT = """<testsuites><testsuite name="pytest" tests="3">
<testcase classname="tests.ops.test_a" name="one" time="90.0"/>
<testcase classname="tests.ops.test_b.TestB" name="two[x.y]" time="30.0"/>
<testcase classname="tests.data.test_c" name="three" time="6.0"><skipped/></testcase>
</testsuite></testsuites>"""


def test_reports_are_added_up_by_folder(tmp_path: Path) -> None:
    for name in ("unit.xml", "others.xml"):
        (tmp_path / name).write_text(REPORT)
    found = read_reports([tmp_path / "unit.xml", tmp_path / "others.xml"])
    assert found == {"data": FolderTime(2, pytest.approx(0.2)), "ops": FolderTime(4, pytest.approx(4.0))}


def test_what_takes_too_long_is_marked() -> None:
    found = {"data": FolderTime(2, 0.2), "model": FolderTime(1, 0.1), "ops": FolderTime(4, 4.0)}
    lines = table(found, {"data": 0.5, "ops": 3.5})
    assert [line.split() for line in lines[1:]] == [
        ["data", "2", "0.2", "0.5"],
        ["model", "1", "0.1", "no", "budget"],
        ["ops", "4", "4.0", "3.5", "OVER"],
        ["all", "7", "4.3", "4.0"],
    ]
