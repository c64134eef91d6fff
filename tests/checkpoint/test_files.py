"""Torch files, headers and the full check: damaged, foreign or dangerous content is named, not loaded."""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import verify
from megatron.checkpoint.layer_files import verify_before_load
from megatron.checkpoint.manifest import read_manifest
from megatron.checkpoint.torch_files import read_file, read_tensors, write_file, write_tensors
from megatron.common.errors import CheckpointError
from tests.support.checkpoints import SHAPE, rewrite, write_weights

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
SHARD = "layer_03-model_01-model_states.pt"


class _Code:
    def __reduce__(self) -> Any:
        return os.system, ("touch it_ran",)


def test_a_file_holds_no_more_bytes_than_its_tensors(tmp_path: Path) -> None:
    flat = torch.randn(1 << 20)  # 4 MiB, like an engine's flat buffer; the tensor is a small view
    entry = write_tensors(tmp_path / "a.pt", {"w": flat[5:1005].view(10, 100)})
    assert entry.bytes == (tmp_path / "a.pt").stat().st_size < 4000 + 2000
    assert torch.equal(read_tensors(tmp_path / "a.pt")["w"], flat[5:1005].view(10, 100))


@pytest.mark.parametrize("content", [_Code(), {"w": torch.zeros(2), "x": _Code()}, [print]])
def test_a_file_that_carries_code_is_refused(tmp_path: Path, content: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"bad\.pt asks for \S+: a checkpoint may hold tensors"):
        read_file(tmp_path / "bad.pt")
    assert not (tmp_path / "it_ran").exists()


def test_a_plain_pickle_with_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(_Code()))
    with pytest.raises(CheckpointError, match=r"bad\.pt"):
        read_file(tmp_path / "bad.pt")
    assert not (tmp_path / "it_ran").exists()


def test_what_could_not_be_read_back_is_not_written_quietly(tmp_path: Path) -> None:
    """Even if a library has allowed the class globally, as megatron-core does for paths."""
    with torch.serialization.safe_globals([type(Path("x"))]), pytest.raises(CheckpointError, match="asks for"):
        write_file(tmp_path / "a.pt", {"schedule": Path("x")})


def test_a_full_disk_is_named_with_file_and_reason(tmp_path: Path) -> None:
    """torch's own message only mentions positions in the file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_file(tmp_path / "big.pt", {"w": torch.zeros(10000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(tmp_path / "big.pt")


def test_a_whole_checkpoint_has_no_problems(tmp_path: Path) -> None:
    folder = write_weights(tmp_path)
    assert verify_before_load(folder, SHAPE, 2, manifest_files=read_manifest(folder).files) == []
    assert verify.verify_checkpoint(folder, workers=4) == []


def _delete(folder: Path) -> None:
    (folder / SHARD).unlink()


def _truncate(folder: Path) -> None:
    os.truncate(folder / SHARD, 2000)


def _misshape(folder: Path) -> None:
    rewrite(folder / SHARD, lambda c: c.update({"mlp.linear2.weight": torch.zeros(16, 13)}))


def _drop_key(folder: Path) -> None:
    rewrite(folder / SHARD, lambda c: c.pop("input_layernorm.scale"))


def _add_key(folder: Path) -> None:
    rewrite(folder / SHARD, lambda c: c.update({"attention.dense.bias": torch.zeros(16)}))


def _integers(folder: Path) -> None:
    rewrite(folder / SHARD, lambda c: c.update({"input_layernorm.scale": torch.zeros(16, dtype=torch.int64)}))


def _not_a_tensor(folder: Path) -> None:
    rewrite(folder / SHARD, lambda c: c.update({"input_layernorm.scale": "one"}))


def _code(folder: Path) -> None:
    torch.save({"input_layernorm.scale": _Code()}, folder / SHARD)


def _foreign_layer(folder: Path) -> None:
    (folder / SHARD).rename(folder / "layer_07-model_01-model_states.pt")


def _whole_rank_gone(folder: Path) -> None:
    for path in folder.glob("*model_01-*"):
        path.unlink()


def _empty(folder: Path) -> None:
    for path in folder.glob("layer*"):
        path.unlink()


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "gpt-neox"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_delete, f"{SHARD} is missing"),
        (_truncate, f"{SHARD} is damaged"),
        (_misshape, f"{SHARD}: mlp.linear2.weight has shape [16, 13], the model's is [16, 12]"),
        (_drop_key, f"{SHARD}: input_layernorm.scale is missing"),
        (_add_key, f"{SHARD}: attention.dense.bias is not a tensor of this layer"),
        (_integers, f"{SHARD}: input_layernorm.scale has dtype int64"),
        (_not_a_tensor, f"{SHARD}: input_layernorm.scale is a str"),
        (_code, f"{SHARD} asks for"),
        (_foreign_layer, "layer_07-model_01-model_states.pt belongs to no layer of a model with num_layers 2"),
        (_whole_rank_gone, "for model_parallel_size 1, the configuration says 2"),
        (_empty, "there is no layer file"),
    ],
)
def test_damage_is_named_from_headers(tmp_path: Path, damage: Any, message: str, manifest: bool) -> None:
    folder = write_weights(tmp_path, manifest=manifest)
    damage(folder)
    problems = verify_before_load(folder, SHAPE, 2, manifest_files=read_manifest(folder).files if manifest else None)
    assert any(message in problem for problem in problems), problems


def test_ranks_share_the_files_among_them(tmp_path: Path) -> None:
    folder = write_weights(tmp_path)
    for path in folder.glob("layer*"):
        os.truncate(path, 100)
    alone = verify_before_load(folder, SHAPE, 2)
    shared = [problem for rank in range(3) for problem in verify_before_load(folder, SHAPE, 2, (rank, 3))]
    assert sorted(alone) == sorted(shared)
    assert len(alone) == 10


def test_another_tensor_parallel_size_says_what_to_run(tmp_path: Path) -> None:
    folder = write_weights(tmp_path, tp=4, shape=replace(SHAPE, num_kv_heads=4))
    (problem,) = [p for p in verify_before_load(folder, SHAPE, 2) if "model_parallel_size" in p]
    assert "for model_parallel_size 4, the configuration says 2" in problem
    assert "convert_hf reshard" in problem


def test_megatron_core_extra_state_is_no_tensor(tmp_path: Path) -> None:
    folder = write_weights(tmp_path)
    rewrite(folder / SHARD, lambda c: c.update({"attention.dense._extra_state": None}))
    assert verify_before_load(folder, SHAPE, 2) == []


def test_every_flipped_byte_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At many positions: in names, tensors, padding and the zip's own tables."""
    folder = write_weights(tmp_path)
    assert verify.main([str(tmp_path)]) == 0
    path = folder / SHARD
    whole = path.read_bytes()
    for position in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert verify.main([str(folder)]) == 1, f"byte {position}"
        assert SHARD in capsys.readouterr().err
    path.write_bytes(whole)
    assert verify.main([str(folder)]) == 0


def test_verify_names_the_tensor_and_files_nothing_vouches_for(tmp_path: Path) -> None:
    folder = write_weights(tmp_path)
    whole = bytearray((folder / SHARD).read_bytes())
    tensor = torch.load(folder / SHARD, weights_only=True)["mlp.linear2.weight"]
    whole[whole.index(tensor.numpy().tobytes()) + 17] ^= 1
    (folder / SHARD).write_bytes(whole)
    (folder / "note.txt").write_text("hello")
    problems = verify.verify_checkpoint(folder)
    assert any("mlp.linear2.weight has checksum" in p for p in problems)
    assert any("note.txt is not in the manifest" in p for p in problems)


def test_the_commands_of_the_guide(tmp_path: Path) -> None:
    write_weights(tmp_path, step=200)
    guide = (ROOT / "docs/checkpoints.md").read_text()
    commands = [line for line in guide.splitlines() if line.startswith("python -m megatron.checkpoint.verify")]
    assert len(commands) == 3
    for command in commands:
        words = command.replace("runs/astro", str(tmp_path)).split()
        if command == commands[0]:  # run one as a user would, the others in this process
            run = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
            assert (run.returncode, run.stderr) == (0, "")
            assert "10 files" in run.stdout
            assert "every byte is as written" in run.stdout
        assert verify.main(words[3:]) == 0


def test_verify_without_a_manifest_has_nothing_to_say(tmp_path: Path) -> None:
    write_weights(tmp_path, manifest=False)
    assert verify.main([str(tmp_path)]) == 2
    assert verify.main([str(tmp_path / "nowhere")]) == 2
