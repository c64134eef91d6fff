"""The `.bin/.idx` format: interoperable with megatron-core in both directions; damage is detected."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.data.indexed import DataError, IndexedFile, IndexedWriter, open_indexed, token_dtype

pytestmark = pytest.mark.unit

DOCUMENTS = [np.arange(n) * 7 % 60000 for n in (5, 1, 300, 0, 42)]


def write(prefix: Path, dtype: type = np.uint16) -> None:
    writer = IndexedWriter(prefix, np.dtype(dtype))
    for document in DOCUMENTS:
        writer.add(document)
    writer.finish()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_core_reads_ours_and_writes_the_same_bytes(tmp_path: Path, dtype: type) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    write(tmp_path / "ours", dtype)
    theirs = IndexedDataset(str(tmp_path / "ours"))
    assert [a.tolist() for a in theirs[0:5]] == [d.tolist() for d in DOCUMENTS]
    builder = IndexedDatasetBuilder(str(tmp_path / "core.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(str(tmp_path / "core.idx"))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"core.{ending}").read_bytes()
    ours = IndexedFile(tmp_path / "core")
    assert [a.tolist() for a in ours] == [d.tolist() for d in DOCUMENTS]
    assert ours.num_tokens == 348
    ours.check_offsets()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["core.bin", "core.idx", "ours.bin", "ours.idx"]


def test_dtype_rule() -> None:
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32
    assert token_dtype(128256) == np.int32


@pytest.mark.parametrize("ending", ["bin", "idx"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "grown", "empty"])
def test_damage_is_named(tmp_path: Path, ending: str, damage: str) -> None:
    write(tmp_path / "d")
    path = tmp_path / f"d.{ending}"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": content[:-3], "grown": content + b"xx", "empty": b""}[damage])
    with pytest.raises(DataError, match=f"d.{ending}"):
        IndexedFile(tmp_path / "d")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "d")
    idx = bytearray((tmp_path / "d.idx").read_bytes())
    for position, value, message in ((0, 84, "not an index"), (9, 2, "not an index"), (17, 6, "dtype code 6")):
        bad = idx.copy()
        bad[position] = value
        (tmp_path / "d.idx").write_bytes(bad)
        with pytest.raises(DataError, match=message):
            IndexedFile(tmp_path / "d")
    with pytest.raises(DataError, match="without its ending"):
        IndexedFile(tmp_path / "d.bin")
    bad = idx.copy()
    bad[34] += 1  # a document that overlaps the next one by a token
    (tmp_path / "d.idx").write_bytes(bad)
    with pytest.raises(DataError, match="disagree"):
        IndexedFile(tmp_path / "d").check_offsets()


def test_a_writer_goes_on_after_a_kill(tmp_path: Path) -> None:
    write(tmp_path / "whole")
    writer = IndexedWriter(tmp_path / "d", token_dtype(1024))
    for document in DOCUMENTS[:3]:
        writer.add(document)
    position = (writer.bytes, writer.documents)
    writer.add(np.arange(99))  # after the last entry of the journal
    writer.sync()
    again = IndexedWriter(tmp_path / "d", token_dtype(1024), resume=position)
    for document in DOCUMENTS[3:]:
        again.add(document)
    again.finish()
    for ending in ("bin", "idx"):
        assert (tmp_path / f"d.{ending}").read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()


def test_a_thousand_sources_need_few_handles(tmp_path: Path) -> None:
    write(tmp_path / "0")
    for i in range(1, 1000):
        for ending in ("bin", "idx"):
            (tmp_path / f"{i}.{ending}").hardlink_to(tmp_path / f"0.{ending}")
    before = len(os.listdir("/proc/self/fd"))
    assert sum(open_indexed(str(tmp_path / f"{i}")).num_tokens for i in range(1000)) == 348_000
    assert len(os.listdir("/proc/self/fd")) - before <= 2 * 64 + 8


def test_the_file_format_needs_no_torch() -> None:
    """So the data commands start immediately."""
    code = (
        "import sys, megatron.data.indexed, megatron.data.header\n"
        "heavy = {'torch', 'megatron.core', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])
