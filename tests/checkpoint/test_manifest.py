"""The manifest is read back as written, and anything that is not a manifest is refused with its name."""

import json
import zlib
from pathlib import Path
from typing import Any

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
from megatron.checkpoint.state_ranges import STATE_KINDS, StoredArray
from megatron.layout import TensorRange

pytestmark = pytest.mark.unit

LAYER = "layer_00-model_00-model_states.pt"


def example() -> Manifest:
    tensor = TensorEntry((4, 2), "bfloat16", checksum(b"\x00" * 16))
    return Manifest(
        {LAYER: FileEntry(5, {"word_embeddings.weight": tensor}), "hf/config.json": FileEntry(2, {}, checksum(b"{}"))},
        {"iteration": 7},
    )


def undigested(manifest: Manifest) -> dict[str, Any]:
    """The content without its own checksum, which would hide other differences."""
    body: dict[str, Any] = json.loads(manifest.to_json())
    del body["digest"]
    return body


def test_round_trip(tmp_path: Path) -> None:
    write_manifest(tmp_path, example())
    assert read_manifest(tmp_path) == example()
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_the_format_on_disk(tmp_path: Path) -> None:
    write_manifest(tmp_path, example())
    body = json.loads((tmp_path / "manifest.json").read_text())
    assert (body["format"], body["version"]) == ("neox-llama-checkpoint", 2)
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
        ({"version": 3}, "version 3; this program reads 'neox-llama-checkpoint', version 1 and 2"),
        ({"files": []}, "files must be a mapping"),
        ({"files": {"../x": {"bytes": 1, "tensors": {}}}}, "outside of the checkpoint folder"),
        ({"files": {"x": {"bytes": -1, "tensors": {}}}}, "integer of at least 0"),
        ({"files": {"x": {"bytes": 1}}}, "tensors must be a mapping"),
        ({"files": {"x": {"bytes": 1, "tensors": {}, "checksum": "md5:1"}}}, "crc32:0123abcd"),
        ({"files": {"x": {"bytes": 1, "tensors": {"w": {"shape": 3, "dtype": "f"}}}}}, "x: w needs a shape"),
    ],
)
def test_refusals(tmp_path: Path, change: dict, message: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(undigested(example()) | change))
    with pytest.raises(ManifestError, match=message):
        read_manifest(tmp_path)


RANGE = {"layer": 2, "tensor": "w", "tp_rank": 0, "start": 8, "stop": 16, "step": 3}
ARRAYS = {kind: {"offset": 32 * place, "crc32": "0123abcd"} for place, kind in enumerate(STATE_KINDS)}


def test_the_index_of_optimizer_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    entry = {"bytes": 96, "tensors": {}, "ranges": [RANGE | ARRAYS]}
    (tmp_path / "manifest.json").write_text(json.dumps(undigested(example()) | {"files": {"x": entry}}))
    manifest = read_manifest(tmp_path)
    (found,) = manifest.files["x"].ranges
    assert (found.where, found.step) == (TensorRange(2, "w", 0, 8, 16), 3)
    assert found.arrays["exp_avg_sq"] == StoredArray(64, (0x0123ABCD,))
    assert json.loads(manifest.to_json())["files"]["x"] == entry


def test_version_1_is_read(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(undigested(example()) | {"version": 1}))
    assert read_manifest(tmp_path) == example()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": 16}, "a range needs a tensor and start < stop"),
        ({"step": -1}, "a range's step must be an integer of at least 0, got -1"),
        ({"tensor": None}, "a range needs a tensor"),
        ({"master": {"offset": 0}}, "master of layer 2 w of tensor rank 0, .*: crc32 must be 1 words"),
        ({"master": {"offset": 0, "crc32": "0123abcd 0123abcd"}}, "crc32 must be 1 words"),
        ({"exp_avg": {"offset": 72, "crc32": "0123abcd"}}, "exp_avg of .* ends beyond the end of the file"),
        ({"exp_avg_sq": None}, "exp_avg_sq of .* needs an offset"),
    ],
)
def test_an_index_that_cannot_be_right_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    files = {"x": {"bytes": 96, "tensors": {}, "ranges": [RANGE | ARRAYS | change]}}
    (tmp_path / "manifest.json").write_text(json.dumps(undigested(example()) | {"files": files}))
    with pytest.raises(ManifestError, match=f"manifest.json: x: .*{message}"):
        read_manifest(tmp_path)


def test_absent_or_broken(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ManifestError, match="is not JSON"):
        read_manifest(tmp_path)


def test_every_flipped_byte_of_a_manifest_is_found_or_means_nothing(tmp_path: Path) -> None:
    """Whichever byte is damaged, the manifest is refused or still reads as written."""
    text = example().to_json().encode()
    for place in range(len(text)):
        for mask in (0x01, 0x20, 0xFF):
            damaged = text[:place] + bytes([text[place] ^ mask]) + text[place + 1 :]
            (tmp_path / "manifest.json").write_bytes(damaged)
            try:
                assert read_manifest(tmp_path) == example(), f"byte {place} of {text[place - 20 : place + 20]!r}"
            except ManifestError:
                continue


def test_a_manifest_without_a_digest_is_that_of_an_earlier_version(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(undigested(example())))
    assert read_manifest(tmp_path) == example()
