"""Sample indices are built once and cached, and damaged ones are named."""

import json
import multiprocessing
import os
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from megatron.data import index_cache
from megatron.data.header import fingerprint
from megatron.data.index_cache import CACHE_FOLDER
from megatron.data.indexed import DataError, open_indexed
from megatron.data.sample import SampleForm
from megatron.data.sources import RunningPack
from tests.support.made_data import LENGTHS, S, numbered, write

pytestmark = pytest.mark.unit


def cached(tmp_path: Path) -> list[Path]:
    return sorted(p for p in (tmp_path / CACHE_FOLDER).iterdir() if p.is_dir())


def test_an_index_is_kept_and_follows_content_and_settings(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", numbered(LENGTHS))
    RunningPack(prefix, SampleForm(S), 3, 50)
    before = {p: p.stat().st_mtime_ns for p in cached(tmp_path)[0].iterdir()}
    RunningPack(prefix, SampleForm(S), 3, 50)
    assert {p: p.stat().st_mtime_ns for p in cached(tmp_path)[0].iterdir()} == before
    for i, source in enumerate(((S, 4, None), (S + 1, 3, None), (S, 3, (0, 9)), (S, 3, (1, 10)))):
        RunningPack(prefix, SampleForm(source[0]), source[1], 50, source[2])
        assert len(cached(tmp_path)) == i + 2
    write(tmp_path / "d", numbered(list(reversed(LENGTHS))))
    open_indexed.cache_clear()
    RunningPack(prefix, SampleForm(S), 3, 50)
    assert len(cached(tmp_path)) == 6


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", numbered(LENGTHS))
    RunningPack(prefix, SampleForm(S), 5, 50)
    folder = cached(tmp_path)[0]
    for path in [*folder.iterdir()]:
        content = path.read_bytes()
        for damage in (content[:-9], b"", None):
            path.unlink()
            if damage is not None:
                path.write_bytes(damage)
            index_cache.open_arrays.cache_clear()
            with pytest.raises(DataError, match=f"{folder.name}: damaged index"):
                RunningPack(prefix, SampleForm(S), 5, 50)
        path.write_bytes(content)


def test_a_folder_that_cannot_be_written_to_is_no_hindrance(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [RunningPack(prefix, SampleForm(S), 3, 9)[i]["tokens"].tolist() for i in range(9)]

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    source = RunningPack(prefix, SampleForm(S), 3, 500)
    assert [source[i]["tokens"].tolist() for i in range(9)] == expected


def _build(prefix: str, barrier: Barrier, folder: str) -> None:
    original = RunningPack.build_index

    def counted(source: RunningPack) -> index_cache.Arrays:
        with open(f"{folder}/built", "a") as file:
            file.write("x")
        return original(source)

    RunningPack.build_index = counted  # type: ignore[method-assign]
    barrier.wait()
    RunningPack(prefix, SampleForm(S), 3, 5000)
    os._exit(0)


def test_of_eight_processes_that_start_at_once_one_builds(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", numbered(LENGTHS))
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(8)
    processes = [context.Process(target=_build, args=(prefix, barrier, str(tmp_path))) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "built").read_text() == "x"


def test_fingerprint(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", numbered(LENGTHS))
    first = fingerprint(prefix)
    assert json.loads(json.dumps(first)) == first
    assert set(first) == {"path", "idx_bytes", "bin_bytes", "hash", "content", "written"}
    assert fingerprint(prefix) == first
    write(tmp_path / "d", numbered([8, 30, *LENGTHS[2:]]))  # the same file sizes, other documents
    assert fingerprint(prefix)["bin_bytes"] == first["bin_bytes"]
    assert fingerprint(prefix)["hash"] != first["hash"]


def test_tokens_that_were_changed_in_place_have_another_content(tmp_path: Path) -> None:
    """Sizes and index stay the same, so the index cache, which depends only on them, remains valid."""
    prefix = write(tmp_path / "d", numbered(LENGTHS))
    first = fingerprint(prefix)
    write(tmp_path / "d", numbered(LENGTHS, first=7))
    now = fingerprint(prefix)
    assert now["hash"] == first["hash"]
    assert now["content"] != first["content"]
    assert now["written"] != first["written"]
