"""Atomic files: either the old or the complete new content, and no leftover files."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.common.atomic_files import replacing, write_bytes, write_text

pytestmark = pytest.mark.unit


def test_the_new_content_appears_when_the_body_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    write_bytes(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    write_text(path, "\u00e5")
    assert path.read_bytes() == b"\xc3\xa5"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("existed", [True, False])
def test_a_failure_leaves_the_file_as_it_was(existed: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if existed:
        path.write_text("old")
    before = list(tmp_path.iterdir())

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == before
    assert not existed or path.read_text() == "old"
