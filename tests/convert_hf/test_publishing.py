"""An output is either complete or absent: rejected requests, kills, resuming, shares on several hosts, full disks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.manifest import read_manifest, size_problems
from megatron.common.crc import combine, zeros
from tests.support.hf_folders import Model, convert, read_hf, same, tag_files, write_hf
from tools.convert_hf.commands import convert as convert_command
from tools.convert_hf.commands.convert import ConversionRequest, prepare_neox
from tools.convert_hf.stream import copy, publish

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
MODEL = Model(layers=3)


def to_neox(tmp_path: Path, name: str, *more: Any, expect: int = 0) -> Path:
    out = tmp_path / name
    convert("to-neox", "--input", tmp_path / "hf", "--output", out, "--tp", 2, *more, expect=expect)
    return out


def files_of(folder: Path) -> dict[str, bytes]:
    """All files, with the folder's own name (the tokenizer's path in model.yml) taken out."""
    return {n: b.replace(str(folder).encode(), b"@") for n, b in tag_files(folder).items()}


@pytest.fixture
def small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_command, "memory_plan", lambda *_: (640, 2))
    monkeypatch.setattr(copy, "SYNC_SECONDS", 0.0)


def test_an_existing_output_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "hf", MODEL)
    out = to_neox(tmp_path, "out")
    before = files_of(out)
    to_neox(tmp_path, "out", expect=2)
    assert "replace it with --force" in capsys.readouterr().err
    assert files_of(out) == before
    (out / "global_step0" / "extra").write_text("old")
    to_neox(tmp_path, "out", "--force")
    assert files_of(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]


def test_force_does_not_replace_a_folder_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "hf", MODEL)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis").write_text("precious")
    to_neox(tmp_path, "home", "--force", expect=2)
    assert "was not written by this command" in capsys.readouterr().err
    assert (tmp_path / "home" / "thesis").read_text() == "precious"
    (tmp_path / "file").write_text("x")
    to_neox(tmp_path, "file", "--force", expect=2)
    (tmp_path / "empty").mkdir()
    to_neox(tmp_path, "empty")


class Interrupted(BaseException):
    pass


@pytest.mark.usefixtures("small_bands")
@pytest.mark.parametrize("jobs", [1, 7, 40])
def test_resumed_bytes_equal_uninterrupted_ones(
    jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_hf(tmp_path / "hf", MODEL)
    expected = files_of(to_neox(tmp_path, "whole"))
    read, count = copy.read_band, [0]

    def stops(*band: Any) -> None:
        count[0] += 1
        if count[0] > jobs:
            raise Interrupted
        read(*band)

    monkeypatch.setattr(copy, "read_band", stops)
    with pytest.raises(Interrupted):
        to_neox(tmp_path, "out")
    monkeypatch.setattr(copy, "read_band", read)
    assert not (tmp_path / "out").exists()
    to_neox(tmp_path, "out", expect=2)
    assert "continue it with --resume" in capsys.readouterr().err
    journal = tmp_path / "out.partial" / ".convert" / "journal_1_of_1.jsonl"
    recorded = len(journal.read_text().splitlines()) - 1
    assert recorded > 0 or jobs == 1
    with open(journal, "a") as file:
        file.write('{"job": 3, "pie')  # a line that the kill cut off
    redone = [0]

    def counts(*band: Any) -> None:
        redone[0] += 1
        read(*band)

    monkeypatch.setattr(copy, "read_band", counts)
    assert files_of(to_neox(tmp_path, "out", "--resume")) == expected
    output_jobs = redone[0] + recorded
    redone[0] = 0
    to_neox(tmp_path, "again")
    assert redone[0] == output_jobs  # nothing was done twice or omitted


@pytest.mark.usefixtures("small_bands")
def test_resume_refuses_another_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = write_hf(tmp_path / "hf", MODEL)

    def fails(*_: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(publish.shutil, "copyfile", fails)  # the weights are written, the small files are not
        with pytest.raises(Interrupted):
            to_neox(tmp_path, "out")
    to_neox(tmp_path, "out", "--resume", "--dtype", "fp32", expect=2)
    assert "started from other files or with other options" in capsys.readouterr().err
    os.utime(tmp_path / "hf" / "model.safetensors", (1, 1))
    to_neox(tmp_path, "out", "--resume", expect=2)
    to_neox(tmp_path, "out", "--force")
    convert("to-hf", "--input", tmp_path / "out", "--output", tmp_path / "back")
    assert same(read_hf(tmp_path / "back"), state)


@pytest.mark.parametrize("when", [0.0, 0.03, 0.1, 0.2])
def test_a_killed_process_leaves_nothing_that_looks_complete(when: float, tmp_path: Path) -> None:
    """SIGKILL at several points; from any state left behind, --resume gives the right bytes."""
    model = Model(layers=12, heads=16, kv_heads=2, head_dim=16, intermediate=512, vocab=1000)
    write_hf(tmp_path / "hf", model)
    expected = files_of(to_neox(tmp_path, "whole", "--max-ram", "52MiB"))
    words = ["to-neox", "--input", tmp_path / "hf", "--output", tmp_path / "out", "--tp", 2, "--quiet"]
    command = [sys.executable, ROOT / "tools" / "convert_hf", *map(str, words), "--max-ram", "52MiB"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    partial = tmp_path / "out.partial"
    while not partial.exists() and process.poll() is None:
        pass
    try:
        process.wait(when)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    if not (tmp_path / "out").exists():
        to_neox(tmp_path, "out", "--resume", "--max-ram", "52MiB")
    assert files_of(tmp_path / "out") == expected
    assert not partial.exists()


@pytest.mark.parametrize("count", [2, 3, 7])
def test_shares_on_several_hosts(count: int, tmp_path: Path) -> None:
    """Shares in any order: the last one completes the folder, with the bytes of a single run."""
    write_hf(tmp_path / "hf", MODEL)
    expected = files_of(to_neox(tmp_path, "whole"))
    for number in range(count, 0, -1):
        assert not (tmp_path / "out").exists()
        to_neox(tmp_path, "out", "--shard", f"{number}/{count}")
    assert files_of(tmp_path / "out") == expected
    convert("to-hf", "--input", tmp_path / "out", "--output", tmp_path / "hf1", "--shard-size", "3KB")
    for number in range(1, count + 1):
        words = ("--shard-size", "3KB", "--shard", f"{number}/{count}")
        convert("to-hf", "--input", tmp_path / "out", "--output", tmp_path / "hf2", *words)
    assert files_of(tmp_path / "hf1") == files_of(tmp_path / "hf2")


def test_shares_divide_the_work(tmp_path: Path) -> None:
    from tools.convert_hf.sources.opening import open_checkpoint

    write_hf(tmp_path / "hf", Model(layers=16))
    source = open_checkpoint(tmp_path / "hf")
    plans = [prepare_neox(source, 2, None, ConversionRequest(tmp_path / "out", shard=(i, 4))).plan for i in range(1, 5)]
    names = [f.name for p in plans for f in p.files]
    assert len(names) == len(set(names)) == 2 * 19
    read = [p.bytes_read for p in plans]
    assert sum(read) == sum(t.nbytes for t in source.tensors.values())
    assert max(read) < 0.3 * sum(read)


def test_a_full_disk_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_hf(tmp_path / "hf", MODEL)
    usage = type("Usage", (), {"free": 10_000})()
    monkeypatch.setattr(publish.shutil, "disk_usage", lambda path: usage)
    to_neox(tmp_path, "out", expect=2)
    assert "10,000 bytes free" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_a_source_that_shrinks_while_it_is_read_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "hf", MODEL)
    original = publish.OutputFolder.write

    def shrink_first(self: Any, progress: Any) -> bool:
        os.truncate(tmp_path / "hf" / "model.safetensors", 5000)
        return original(self, progress)

    monkeypatch.setattr(publish.OutputFolder, "write", shrink_first)
    to_neox(tmp_path, "out", expect=2)
    assert not (tmp_path / "out").exists()


def test_manifest_and_zip_checksums(tmp_path: Path) -> None:
    """Every checksum matches the bytes; strict zip tools accept the files; torch reads them, with and without mmap."""
    write_hf(tmp_path / "hf", MODEL)
    tag = to_neox(tmp_path, "out", "--vocab-divisible-by", 64) / "global_step0"
    manifest = read_manifest(tag)
    assert size_problems(tag, manifest) == []
    assert set(manifest.files) == {n for n in tag_files(tag) if n != "manifest.json"}
    for path in tag.glob("*.pt"):
        assert zipfile.ZipFile(path).testzip() is None
        meta = torch.load(path, weights_only=True)
        assert path.name.startswith("mp_rank") or same(meta, torch.load(path, weights_only=True, mmap=True))
    for name, entry in manifest.files.items():
        for tensor, value in (torch.load(tag / name, weights_only=True) if entry.tensors else {}).items():
            raw = value.contiguous().view(torch.uint8).numpy().tobytes()
            assert entry.tensors[tensor].checksum == f"crc32:{zlib.crc32(raw):08x}"
            assert entry.tensors[tensor].shape == tuple(value.shape)
            assert entry.tensors[tensor].dtype == str(value.dtype).removeprefix("torch.")
    meta = torch.load(tag / "mp_rank_01_model_states.pt", weights_only=True)
    assert meta["module"] is None
    assert meta["mp_world_size"] == 2
    assert not (tag / "mp_rank_02_model_states.pt").exists()
    assert (tag.parent / "latest").read_text().strip() == "global_step0"


def test_crc_of_pieces() -> None:
    data = os.urandom(3000)
    for cut in (0, 1, 17, 1500, 2999, 3000):
        a, b = data[:cut], data[cut:]
        assert combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(data)
    for size in (0, 1, 2, 1000, 1 << 20):
        assert zeros(size) == zlib.crc32(bytes(size))


def test_files_beyond_four_gigabytes(tmp_path: Path) -> None:
    """Sizes and offsets that need zip64, in a sparse file, of which only the structure is read back."""
    from tools.convert_hf.formats.dtypes import BY_NAME
    from tools.convert_hf.formats.torch_file import TorchLayout, open_torch

    float32 = BY_NAME["float32"]
    tensors = [("a", float32, (3,)), ("big", float32, ((1 << 30) + 5, 1)), ("b", float32, (2, 2))]
    layout = TorchLayout("stem", tensors)
    path = tmp_path / "big.pt"
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    raw = value.numpy().tobytes()
    big = ((1 << 30) + 5) * 4
    with open(path, "wb") as file:
        file.truncate(layout.size)
        for offset, block in layout.blocks({"a": zeros(12), "big": zeros(big), "b": zlib.crc32(raw)}):
            file.seek(offset)
            file.write(block)
        file.seek(layout.offsets["b"])
        file.write(raw)
    archive = zipfile.ZipFile(path)
    assert archive.getinfo("stem/data/1").file_size == big
    assert archive.read("stem/data/2") == raw
    opened = open_torch(path)
    assert opened.stored("b", opened.value["b"]).offset == layout.offsets["b"]
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert torch.equal(loaded["b"], value)
    assert loaded["big"].shape == ((1 << 30) + 5, 1)


def test_plan_prints_everything_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "hf", MODEL)
    to_neox(tmp_path, "out", "--plan", "--vocab-divisible-by", 64)
    out = capsys.readouterr().out
    assert "attention.query_key_value.weight 24x32 bfloat16 <- model.layers.0.self_attn.q_proj.weight, " in out
    assert "model.embed_tokens.weight, zero padding" in out
    assert "nothing was written" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_inspect_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "hf", MODEL)
    out = to_neox(tmp_path, "out")
    capsys.readouterr()
    convert("inspect", out, "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "neox pipeline"
    assert facts["tensor_parallel_size"] == 2
    assert facts["parameters"] == sum(t.numel() for t in MODEL.state().values())
    assert facts["settings"]["rope_scaling"]["factor"] == 8.0
    assert facts["missing"] == []


@pytest.mark.usefixtures("small_bands")
def test_a_share_left_from_another_job_is_not_used(tmp_path: Path) -> None:
    """Share 2 of an older conversion must not be joined with share 1 of a newer one."""
    write_hf(tmp_path / "hf", MODEL)
    to_neox(tmp_path, "out", "--shard", "2/2")
    (tmp_path / "hf").rename(tmp_path / "old")
    state = write_hf(tmp_path / "hf", MODEL, MODEL.state(seed=1))
    to_neox(tmp_path, "out", "--shard", "1/2")
    assert not (tmp_path / "out").exists()
    to_neox(tmp_path, "out", "--shard", "2/2")
    convert("to-hf", "--input", tmp_path / "out", "--output", tmp_path / "back")
    assert same(read_hf(tmp_path / "back"), state)


def test_copied_and_skipped_files_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "hf", MODEL)
    (tmp_path / "hf" / "original").mkdir()
    (tmp_path / "hf" / "training_args.bin").write_bytes(b"x")
    to_neox(tmp_path, "out")
    out = capsys.readouterr().out
    assert "global_step0/hf/LICENSE.txt" in out
    assert "left behind: original/\n" in out


def test_checksums_of_ranges_in_any_order() -> None:
    import random

    data, chance = os.urandom(1000), random.Random(3)
    cuts = sorted(chance.sample(range(1, 1000), 30))
    pieces = [(0, 1, a, b - a, zlib.crc32(data[a:b])) for a, b in zip([0, *cuts], [*cuts, 1000], strict=True)]
    for _ in range(20):
        chance.shuffle(pieces)
        sums = copy.Checksums()
        for piece in pieces[:-1]:
            sums.add(piece)
        assert sums.whole(0, 1, 1000) is None
        sums.add(pieces[-1])
        assert sums.whole(0, 1, 1000) == zlib.crc32(data)
        sums.add((0, 1, 1000, 5, 7))  # bytes beyond the end
        assert sums.whole(0, 1, 1000) is None
