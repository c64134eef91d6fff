"""Bad input: one clear error, exit code 2, nothing written."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.converter_inputs import write_neox_pipeline
from tests.support.hf_folders import Model, convert, write_hf
from tests.support.neox_oracle import neox_files

pytestmark = pytest.mark.unit

MODEL = Model()
NORM = "model.norm.weight"


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: Any, verb: str = "to-neox") -> str:
    """The one-line error of a conversion that must write nothing."""
    arguments = ["--input", tmp_path / "in", "--output", tmp_path / "out", *words]
    convert(verb, *arguments, *(["--tp", 2] if verb == "to-neox" else []), expect=2)
    error = capsys.readouterr().err
    assert error.startswith("convert_hf: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    return error


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    changed = change(header)
    text = (changed if isinstance(changed, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def set_offsets(name: str, start: int, stop: int) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        begin, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = [begin + start, end + stop]

    return change


def set_field(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].__setitem__(key, value)


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header.pop(name)


def twice(header: dict[str, Any]) -> str:
    text = json.dumps(header)
    return text[:-1] + f', "{NORM}": ' + json.dumps(header[NORM]) + "}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_offsets(NORM, -2, -2), "overlaps|hole"),
        (set_offsets(NORM, 0, 4), "its range has"),
        (set_offsets(NORM, 1 << 40, 1 << 40), "beyond the end"),
        (set_field(NORM, "data_offsets", [-4, 60]), "no valid data_offsets"),
        (set_field(NORM, "data_offsets", [0.5, 64]), "no valid data_offsets"),
        (set_field(NORM, "shape", [True, 32]), "no valid shape"),
        (set_field(NORM, "shape", [-32]), "no valid shape"),
        (set_field(NORM, "shape", [16, 2]), "has shape \\[16, 2\\], the configuration says \\[32\\]"),
        (set_field(NORM, "dtype", "F8_E4M3"), "dtype 'F8_E4M3'"),
        (set_field(NORM, "dtype", "I16"), "is int16; weights may be"),
        (drop(NORM), "hole|end at byte"),
        (twice, "appears twice"),
        (lambda header: "[1, 2]", "must be a JSON object"),
        (lambda header: "{", "not valid JSON"),
        (lambda header: "[" * 100_000, "not valid JSON"),
        (lambda header: header.__setitem__(NORM, 7), "must be described by a JSON object"),
    ],
)
def test_safetensors_header(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    write_hf(tmp_path / "in", MODEL)
    edit_header(tmp_path / "in" / "model.safetensors", change)
    assert re.search(message, refused(tmp_path, capsys))


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_truncated_safetensors(keep: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "in", MODEL)
    path = tmp_path / "in" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "truncated" in refused(tmp_path, capsys)


def edit_json(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text())
    for key, new in changes.items():
        if new is None:
            value.pop(key)
        else:
            value[key] = new
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"rope_scaling": None}, "rope_scaling is missing"),
        ({"rms_norm_eps": None}, "rms_norm_eps is missing"),
        ({"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is missing"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a positive number"),
        ({"num_attention_heads": 7}, "do not divide one another"),
        ({"head_dim": 128}, "head_dim is 128"),
        ({"attention_bias": True}, "attention_bias is set"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"vocab_size": 51}, "model.embed_tokens.weight has shape"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 1}, "unexpected tensors"),
        ({"num_hidden_layers": 10**30}, "positive whole number"),
    ],
)
def test_config(changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "in", MODEL)
    edit_json(tmp_path / "in" / "config.json", **changes)
    assert message in refused(tmp_path, capsys)


def test_set_cannot_replace_existing_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "in", MODEL)
    assert "may only fill an absent field" in refused(tmp_path, capsys, "--set", "rms_norm_eps=1e-6")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../secret.safetensors", "not a plain file name"),
        ("/etc/passwd", "not a plain file name"),
        ("..", "not a plain file name"),
        ("a\\b.safetensors", "not a plain file name"),
        (7, "not a plain file name"),
        ("model-00009-of-00002.safetensors", "is missing, but"),
    ],
)
def test_index_paths(file: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "in", MODEL, shards=2)
    index = tmp_path / "in" / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"][NORM] = file
    index.write_text(json.dumps(value))
    assert message in refused(tmp_path, capsys)


def test_index_and_files_disagree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "in", MODEL, shards=2)
    index = tmp_path / "in" / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    names = sorted(set(value["weight_map"].values()))
    other = names[0] if value["weight_map"][NORM] == names[1] else names[1]
    index.write_text(json.dumps(value | {"weight_map": value["weight_map"] | {NORM: other}}))
    assert "according to model.safetensors.index.json" in refused(tmp_path, capsys)
    del value["weight_map"][NORM]
    index.write_text(json.dumps(value))
    assert "is in it, but not listed" in refused(tmp_path, capsys)


def test_missing_shard_and_missing_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "in", MODEL, shards=2)
    (tmp_path / "in" / "model-00002-of-00002.safetensors").unlink()
    assert "is missing, but model.safetensors.index.json lists it" in refused(tmp_path, capsys)
    (tmp_path / "in" / "model.safetensors.index.json").unlink()
    assert "index.json is missing" in refused(tmp_path, capsys)


def test_link_loops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "in", MODEL)
    (tmp_path / "in" / "tokenizer.model").symlink_to("tokenizer.model")
    assert "broken link" in refused(tmp_path, capsys)
    (tmp_path / "in" / "tokenizer.model").unlink()
    (tmp_path / "in" / "config.json").unlink()
    (tmp_path / "in" / "config.json").symlink_to(tmp_path / "in" / "config.json")
    refused(tmp_path, capsys)


def test_links_of_a_download_cache_are_followed(tmp_path: Path) -> None:
    """The Hugging Face cache stores files elsewhere and links to them."""
    write_hf(tmp_path / "blobs", MODEL)
    (tmp_path / "in").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "in" / path.name).symlink_to(Path("..", "blobs", path.name))
    convert("to-neox", "--input", tmp_path / "in", "--output", tmp_path / "out", "--tp", 2)
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def test_a_pickle_that_carries_code_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = write_hf(tmp_path / "in", MODEL)
    (tmp_path / "in" / "model.safetensors").unlink()
    torch.save(dict(state) | {"x": Attack(tmp_path / "owned")}, tmp_path / "in" / "pytorch_model.bin")
    assert "names io.open, which is not data" in refused(tmp_path, capsys)
    files: dict[str, dict[str, Any]] = neox_files(state, MODEL.heads, MODEL.kv_heads, 2, 1)
    (tmp_path / "in").rename(tmp_path / "hf")
    tag = write_neox_pipeline(tmp_path / "in", files, MODEL, 2)
    meta = tag / "mp_rank_00_model_states.pt"
    torch.save({"module": None, "args": Attack(tmp_path / "owned")}, meta)
    assert "names io.open" in refused(tmp_path, capsys, "--hf-source", tmp_path / "hf", verb="to-hf")
    torch.save({"module": None, "args": {}}, meta)
    torch.save({"word_embeddings.weight": Attack(tmp_path / "owned")}, tag / "layer_00-model_00-model_states.pt")
    assert "names io.open" in refused(tmp_path, capsys, "--hf-source", tmp_path / "hf", verb="to-hf")
    assert not (tmp_path / "owned").exists()


def test_old_pickle_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = write_hf(tmp_path / "in", MODEL)
    (tmp_path / "in" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "in" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert "not a torch file of torch 1.6 or newer" in refused(tmp_path, capsys)


def test_a_pickle_cannot_make_the_reader_allocate_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A memo index of four billion makes the standard unpickler ask for tens of gigabytes."""
    write_hf(tmp_path / "in", MODEL)
    (tmp_path / "in" / "model.safetensors").unlink()
    data = b"\x80\x02}r" + struct.pack("<I", 0xFFFFFFF0) + b"."
    with zipfile.ZipFile(tmp_path / "in" / "pytorch_model.bin", "w") as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/version", "3\n")
    assert "model.embed_tokens.weight is missing" in refused(tmp_path, capsys)


def neox(tmp_path: Path, change: Callable[[dict[str, dict[str, Any]]], Any]) -> Path:
    state = write_hf(tmp_path / "hf", MODEL)
    files: dict[str, dict[str, Any]] = neox_files(state, MODEL.heads, MODEL.kv_heads, 2, 1)
    change(files)
    return write_neox_pipeline(tmp_path / "in", files, MODEL, 2)


def _third(files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return files["layer_03-model_01-model_states.pt"]


def _drop_last_rank(files: dict[str, dict[str, Any]]) -> None:
    for name in [n for n in files if "model_01" in n]:
        del files[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("layer_03-model_01-model_states.pt"), "files are missing: layer 03 of rank 01"),
        (_drop_last_rank, "model_parallel_size 2, but there are files of 1 ranks"),
        (lambda f: [f.pop(f"layer_03-model_0{r}-model_states.pt") for r in range(2)], "layer 03 is missing"),
        (lambda f: [f.pop(f"layer_06-model_0{r}-model_states.pt") for r in range(2)], "there is no output head"),
        (lambda f: _third(f).pop("mlp.linear2.weight"), "tensor mlp.linear2.weight is missing"),
        (lambda f: _third(f).update({"mlp.linear1.bias": torch.ones(2)}), "tensor mlp.linear1.bias is unexpected"),
        (lambda f: _third(f).update({"mlp.linear2.weight": torch.ones(3, 4)}), "has shape [3, 4]"),
        (lambda f: _third(f).update({"mlp.linear2.weight": _third(f)["mlp.linear2.weight"].float()}), "is float32"),
        (lambda f: _third(f).update({"x": [1, 2]}), "the entry 'x' is not a tensor"),
        (
            lambda f: _third(f).update({"mlp.linear2.weight": _third(f)["mlp.linear2.weight"].t().contiguous().t()}),
            "is not contiguous",
        ),
    ],
)
def test_neox_files(
    change: Callable[[dict[str, dict[str, Any]]], Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    neox(tmp_path, change)
    assert message in refused(tmp_path, capsys, "--hf-source", tmp_path / "hf", verb="to-hf")


def test_export_needs_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    neox(tmp_path, lambda files: None)
    assert "give the folder that the model came from: --hf-source" in refused(tmp_path, capsys, verb="to-hf")


@pytest.mark.parametrize("tag", ["../elsewhere", "/tmp", "", "global_step8"])
def test_latest_names_a_folder_beside_it(tag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    neox(tmp_path, lambda files: None)
    (tmp_path / "in" / "latest").write_text(tag)
    assert str(tmp_path / "in" / "latest") in refused(tmp_path, capsys, verb="to-hf")


def test_manifest_that_lists_more_than_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "hf", MODEL)
    convert("to-neox", "--input", tmp_path / "hf", "--output", tmp_path / "in", "--tp", 2)
    (tmp_path / "in" / "global_step0" / "mp_rank_01_model_states.pt").unlink()
    assert "mp_rank_01_model_states.pt is missing" in refused(tmp_path, capsys, verb="to-hf")


def test_truncated_layer_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = neox(tmp_path, lambda files: None) / "layer_02-model_01-model_states.pt"
    for keep in (0, 100, -1, -200):
        data = path.read_bytes()
        path.write_bytes(data[:keep])
        assert str(path) in refused(tmp_path, capsys, "--hf-source", tmp_path / "hf", verb="to-hf")
        path.write_bytes(data)


def test_pickle_protocols_of_plain_values() -> None:
    """Plain values written with any protocol are read, and only as data."""
    from tools.convert_hf.errors import ConvertError
    from tools.convert_hf.formats.pickles import read_pickle

    value = {"a": [1, -2, 300, 70_000, 1 << 40, 2.5, None, True, (), (1,), (1, 2), "text"], "b": {"c": "x" * 300}}
    for protocol in range(2, 6):
        assert read_pickle(pickle.dumps(value, protocol), "test") == value
    with pytest.raises(ConvertError, match=r"names builtins\.eval"):
        read_pickle(b"cbuiltins\neval\n(X\x01\x00\x00\x001tR.", "test")
    with pytest.raises(ConvertError, match=r"names os\.system"):
        read_pickle(b"cos\nsystem\n(X\x01\x00\x00\x001tR.", "test", inert=True)
