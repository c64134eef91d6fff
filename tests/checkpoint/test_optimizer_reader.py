"""Optimizer files are read in blocks at any tensor-parallel size, verified, in bounded memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.checkpoint import state_ranges
from megatron.checkpoint.manifest import FileEntry, Manifest, file_checksum, read_manifest
from megatron.checkpoint.optimizer_files import OptimizerIndex, plan_file, write_optimizer_file
from megatron.checkpoint.optimizer_load import SavedOptimizer
from megatron.checkpoint.optimizer_reader import StateReader
from megatron.checkpoint.saved import SavedCheckpoint
from megatron.checkpoint.state import capture_rng, restore_rng, rng_from_bytes, rng_to_bytes
from megatron.common.errors import CheckpointError
from megatron.layout import LlamaShape, TensorRange, TensorSplit, layer_file_name, layer_files, padded_vocab_size
from tests.characterization.record import RECORDED
from tests.support.layouts import KINDS, whole_state
from tests.support.training_checkpoints import STEP, write_training_checkpoint

pytestmark = pytest.mark.unit

SHAPE = LlamaShape(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=8,
    num_kv_heads=4,
    intermediate_size=48,
    vocab_size=61,
    padded_vocab_size=62,
    tied=False,
)


def split(tp: int) -> TensorSplit:
    return TensorSplit(replace(SHAPE, padded_vocab_size=padded_vocab_size(61, 1, tp)), tp)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint at TP2 with blocks of 70 elements."""
    monkeypatch.setattr(state_ranges, "BLOCK", 70)
    return write_training_checkpoint(tmp_path, SHAPE, 2, 1, 2)


def read_all(reader: StateReader, here: TensorSplit) -> dict[tuple[int, str, str], np.ndarray]:
    found = {}
    for layer, _, rows in layer_files(here.shape):
        for row in rows:
            for kind in KINDS:
                out = np.full(here.numel(row), np.nan, dtype=np.float32)
                reader.read(TensorRange(layer, row.neox, 0, 0, len(out)), kind, out)
                found[layer, row.neox, kind] = out
    return found


def test_few_blocks_are_held_and_few_are_read_twice(folder: Path) -> None:
    index = OptimizerIndex.of(read_manifest(folder), split(2))
    total = sum(4 * 3 * len(part.where) for entry in read_manifest(folder).files.values() for part in entry.ranges)
    with StateReader(folder, index, split(1), blocks=6) as reader:
        found = read_all(reader, split(1))
        assert len(reader._blocks) <= 6
    # Norms are read from one rank only; blocks are read again where more are needed at once than are held.
    assert 0.9 * total < reader.bytes_read < 2 * total
    expected = whole_state(folder)
    for kind in KINDS:
        assert np.array_equal(
            found[0, "word_embeddings.weight", kind].reshape(61, 32),
            expected[kind, "model.embed_tokens.weight"].numpy(),
        )
        names = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate")]
        both = torch.cat([expected[kind, name] for name in names]).numpy()
        assert np.array_equal(found[2, "mlp.linear1.weight", kind].reshape(96, 32), both)


def test_threads_read_each_block_once(folder: Path) -> None:
    index = OptimizerIndex.of(read_manifest(folder), split(2))
    with StateReader(folder, index, split(1), blocks=10_000) as alone:
        expected = read_all(alone, split(1))
    with StateReader(folder, index, split(1), blocks=10_000) as reader, ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: read_all(reader, split(1)), range(4)):
            assert all(np.array_equal(found[key], expected[key]) for key in expected)
    assert reader.bytes_read == alone.bytes_read


def test_a_damaged_block_is_named_and_others_are_read(folder: Path) -> None:
    index = OptimizerIndex.of(read_manifest(folder), split(2))
    (placed, *_) = index.overlapping(2, "mlp.linear2.weight", 1, 0, 100)
    path = folder / placed.file
    data = bytearray(path.read_bytes())
    data[placed.state.arrays["master"].offset + 1] ^= 128
    path.write_bytes(data)
    with StateReader(folder, index, split(2)) as reader:
        first, end = placed.state.block(0)
        where = f"master of layer 2 mlp.linear2.weight, elements [{first}, {end}) of tensor rank 1"
        with pytest.raises(CheckpointError) as error:
            reader.read(TensorRange(2, "mlp.linear2.weight", 1, 0, 10), "master", np.empty(10, dtype=np.float32))
        assert f"{path} is damaged: {where}" in str(error.value)
        reader.read(TensorRange(2, "mlp.linear2.weight", 1, 0, 10), "exp_avg", np.empty(10, dtype=np.float32))


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_file_that_changes_while_it_is_read(folder: Path, damage: str) -> None:
    index = OptimizerIndex.of(read_manifest(folder), split(2))
    for path in folder.glob("*.safetensors"):
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:3000])
    with (
        StateReader(folder, index, split(1)) as reader,
        pytest.raises(CheckpointError, match=r"rank_0000\d_optim") as e,
    ):
        read_all(reader, split(1))
    assert ("cannot be opened" if damage == "gone" else "ended at byte") in str(e.value)


def _entries(folder: Path) -> dict[str, FileEntry]:
    return {name: entry for name, entry in read_manifest(folder).files.items() if entry.ranges}


def _lose(files: dict[str, list[Any]]) -> None:
    next(iter(files.values())).pop()


def _repeat(files: dict[str, list[Any]]) -> None:
    one, other, *_ = files.values()
    other.append(one[0])


def _foreign(files: dict[str, list[Any]]) -> None:
    ranges = next(iter(files.values()))
    ranges.append(replace(ranges[0], where=replace(ranges[0].where, layer=99)))


def _older(files: dict[str, list[Any]]) -> None:
    ranges = next(iter(files.values()))
    ranges[0] = replace(ranges[0], step=STEP - 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_lose, "is not there once from element"),
        (_repeat, "is not there once from element"),
        (_foreign, "holds layer 99 .*, which the model does not have"),
        (_older, "is of steps 6, 7"),
    ],
)
def test_an_index_without_each_element_once_is_found(folder: Path, change: Any, message: str) -> None:
    files = {name: list(entry.ranges) for name, entry in _entries(folder).items()}
    assert OptimizerIndex(files, split(2)).problems() == []
    change(files)
    with pytest.raises(CheckpointError, match=message):
        raise CheckpointError("; ".join(OptimizerIndex(files, split(2)).problems()))
    assert OptimizerIndex(files, split(1)).problems(), "another split has other elements"


def test_the_file_is_what_its_entry_says(tmp_path: Path) -> None:
    where = TensorRange(3, "w", 1, 10, 2_200_010)  # three blocks, the last one smaller
    arrays = {
        kind: np.random.default_rng(place).random(len(where), dtype=np.float32) for place, kind in enumerate(KINDS)
    }
    path = tmp_path / "rank_00000_optim_states.safetensors"
    entry = write_optimizer_file(path, {where: 5}, lambda _, kind: arrays[kind].data, b"dice")
    assert entry.checksum == file_checksum(path), "put together from the sums of its blocks"
    assert entry.bytes == path.stat().st_size == plan_file([where], 4).size
    (part,) = entry.ranges
    assert (part.step, len(part.arrays["exp_avg"].checksums)) == (5, 3)
    manifest = Manifest.from_json(Manifest({path.name: entry}).to_json())
    assert manifest.files[path.name] == entry
    data = path.read_bytes()
    offset = part.arrays["exp_avg_sq"].offset
    assert data[offset : offset + 4 * len(where)] == arrays["exp_avg_sq"].tobytes()
    assert entry.random_state is not None
    assert data[entry.random_state.offset :][: entry.random_state.size] == b"dice"


def test_what_is_not_the_size_of_its_range_is_not_written_quietly(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"master of layer 0 w of tensor rank 0, .* has 4 bytes, not 8"):
        write_optimizer_file(tmp_path / "x", {TensorRange(0, "w", 0, 0, 2): 1}, lambda *_: memoryview(b"1234"))


def test_random_states_survive_as_json() -> None:
    before = capture_rng()
    data = rng_to_bytes(before)
    drawn = torch.rand(4), np.random.random(3)
    restore_rng(rng_from_bytes(data))
    assert torch.equal(torch.rand(4), drawn[0])
    assert np.array_equal(np.random.random(3), drawn[1])
    with pytest.raises(ValueError, match="not random states"):
        rng_from_bytes(b'{"python": 1}')


def test_version_1_is_found_for_any_layout_and_read_as_it_was_written() -> None:
    """Every element of every rank's partition is found by DeepSpeed's own fragment mapping."""
    folder = RECORDED / "checkpoints/global_step10"
    checkpoint = SavedCheckpoint(folder, read_manifest(folder))
    shape = LlamaShape(**checkpoint.provenance["shape"])
    optimizer = SavedOptimizer(checkpoint, TensorSplit(shape, 2))
    optimizer.join([optimizer.read_part(rank, 3) for rank in range(3)])
    assert optimizer.index.problems() == []
    # In fp32 the masters are the weights: at TP1 they are the rows of both ranks, concatenated.
    one = TensorSplit(shape, 1)
    index, row = next(
        (i, row) for i, _, rows in layer_files(shape) for row in rows if row.neox == "final_linear.weight"
    )
    whole = np.empty(one.numel(row), np.float32)
    with StateReader(folder, optimizer.index, one) as reader:
        reader.read(TensorRange(index, row.neox, 0, 0, len(whole)), "master", whole)
    shards = [torch.load(folder / layer_file_name(index, rank), weights_only=True)[row.neox] for rank in range(2)]
    assert np.array_equal(whole, torch.cat(shards).flatten().numpy())
