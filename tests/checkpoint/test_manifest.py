"""The manifest: what is written is read back, and what is not a manifest is refused by name."""

import json
import zlib
from pathlib import Path

import pytest

from megatron.checkpoint.manifest import (
    FileEntry,
    Manifest,
    ManifestError,
    TensorEntry,
    checksum,
    file_checksum,
    read_manifest,
    size_problems,
    write_manifest,
)

pytestmark = pytest.mark.unit

LAYER = "layer_00-model_00-model_states.pt"


def example() -> Manifest:
    tensor = TensorEntry((4, 2), "bfloat16", checksum(b"\x00" * 16))
    return Manifest(
        {LAYER: FileEntry(5, {"word_embeddings.weight": tensor}), "hf/config.json": FileEntry(2, {}, checksum(b"{}"))},
        {"iteration": 7},
    )


def test_round_trip(tmp_path: Path) -> None:
    write_manifest(tmp_path, example())
    assert read_manifest(tmp_path) == example()
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_the_format_on_disk(tmp_path: Path) -> None:
    write_manifest(tmp_path, example())
    body = json.loads((tmp_path / "manifest.json").read_text())
    assert (body["format"], body["version"]) == ("neox-llama-checkpoint", 1)
    assert body["files"][LAYER] == {
        "bytes": 5,
        "tensors": {
            "word_embeddings.weight": {
                "shape": [4, 2],
                "dtype": "bfloat16",
                "checksum": f"crc32:{zlib.crc32(bytes(16)):08x}",
            }
        },
    }


def test_sizes(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_bytes(b"{}")
    (tmp_path / LAYER).write_bytes(b"12345")
    assert size_problems(tmp_path, example()) == []
    assert file_checksum(tmp_path / "hf/config.json") == example().files["hf/config.json"].checksum
    (tmp_path / LAYER).write_bytes(b"1234")
    (tmp_path / "hf/config.json").unlink()
    problems = size_problems(tmp_path, example())
    assert len(problems) == 2
    assert any(f"{LAYER} has 4 bytes, the manifest says 5" in p for p in problems)
    assert any("config.json is missing" in p for p in problems)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "says format 'other'"),
        ({"version": 2}, "version 2"),
        ({"files": []}, "files must be a mapping"),
        ({"files": {"../x": {"bytes": 1, "tensors": {}}}}, "outside of the checkpoint folder"),
        ({"files": {"x": {"bytes": -1, "tensors": {}}}}, "integer of at least 0"),
        ({"files": {"x": {"bytes": 1}}}, "tensors must be a mapping"),
        ({"files": {"x": {"bytes": 1, "tensors": {}, "checksum": "md5:1"}}}, "crc32:0123abcd"),
        ({"files": {"x": {"bytes": 1, "tensors": {"w": {"shape": 3, "dtype": "f"}}}}}, "x: w needs a shape"),
    ],
)
def test_refusals(tmp_path: Path, change: dict, message: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(json.loads(example().to_json()) | change))
    with pytest.raises(ManifestError, match=message):
        read_manifest(tmp_path)


def test_absent_or_broken(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ManifestError, match="is not JSON"):
        read_manifest(tmp_path)
