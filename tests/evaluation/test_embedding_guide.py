"""Every command of docs/embeddings.md, on a converted checkpoint at TP2 x PP2, through deepy.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import yaml

from tests.support.documentation import documented_commands
from tests.support.evaluation_models import CASE, SKY, hidden_states, run_from, write_guide_inputs
from tests.support.made_images import blobs, import_archive
from tests.support.patch_models import PatchCase

pytestmark = pytest.mark.distributed
GUIDE = "docs/embeddings.md"
IMAGES = 9
PATCHES = PatchCase(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=48, seq=15)
TEXTS = [f"{question} {number} {row[number % 4]}" for number in range(14) for question, *row in SKY]  # 112 texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vocab_folder: Path) -> Path:
    """A working directory with the files used in the guide."""
    place = tmp_path_factory.mktemp("guide")
    write_guide_inputs(place, vocab_folder)
    records = [{"id": f"2411.{number:05}", "text": text} for number, text in enumerate(TEXTS)]
    rows = [f"{one['id']},{1990 + n % 30},{'ab'[n % 8 // 4]}" for n, one in enumerate(records)]
    (place / "labels.csv").write_text("\n".join(["id,year,field", *rows]) + "\n")
    (place / "adapted").symlink_to("checkpoints")
    (place / "abstracts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    parquet.write_table(arrow.Table.from_pylist(records), place / "abstracts.parquet")
    return place


def write_galaxies(place: Path) -> None:
    """Images, and a patch model saved before its first step changes much."""
    import_archive(place, "galaxies", blobs(IMAGES, 16), ids=np.arange(IMAGES).astype(str))
    keys = dict(PATCHES.neox().merged) | {"train_data_paths": [str(place / "galaxies")], "train_iters": 1}
    evaluated = {name: value for name, value in keys.items() if name not in ("from_scratch", "optimizer")}
    (place / "galaxies.yml").write_text(yaml.safe_dump(evaluated))
    saving = {"save": str(place / "galaxies_run"), "extra_save_iters": [1], "num_gpus": 1, "eval_iters": 0}
    (place / "train.yml").write_text(yaml.safe_dump(keys | saving))
    done = run_from(place, "python deepy.py train.py train.yml")
    assert done.returncode == 0, done.stderr


def test_vectors_of_the_first_command_match_the_export(folder: Path, hf_tokenizer: Any) -> None:
    command = documented_commands(GUIDE)[0]
    done = run_from(folder, command)
    assert done.returncode == 0, done.stderr
    assert "112 texts, " in done.stdout
    means = np.stack([states[-1, 1:].mean(0) for states in hidden_states(hf_tokenizer, TEXTS)])
    assert np.abs(np.load(folder / "vectors/abstracts.npy") - means).max() < 1e-5
    report = json.loads((folder / "vectors/abstracts.report.json").read_text())
    assert (report["layers"], report["pooling"], report["left_out"]) == ([CASE.layers], "mean", {})
    assert report["model"].startswith("crc32:")
    again = run_from(folder, command)
    assert again.returncode == 2
    assert "already exists and is complete" in again.stderr


@pytest.mark.slow
def test_all_other_commands_of_the_guide(folder: Path, hf_tokenizer: Any) -> None:
    commands = documented_commands(GUIDE)
    assert len(commands) == 10
    write_galaxies(folder)
    for command in commands[1:]:
        done = run_from(folder, command)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    table = parquet.read_table(folder / "vectors/layers.parquet")
    last = hidden_states(hf_tokenizer, TEXTS[2:3])[0][1, -1]
    assert np.abs(table["layer_1"][2].as_py() - last / np.linalg.norm(last)).max() < 1e-5
    galaxies = np.load(folder / "vectors/galaxies.npy")
    assert galaxies.shape == (IMAGES, PATCHES.layers + 1, PATCHES.hidden)
    retrieval = json.loads((folder / "retrieval.json").read_text())
    assert retrieval["documents"] == len(TEXTS)
    test = retrieval["models"]["adapted"]["against_base"]["raw"]
    assert test["gained"] == test["lost"] == 0  # it is the same model
    probe = json.loads((folder / "probe.json").read_text())
    assert {*probe["properties"]} == {"year", "field"}
    assert {*probe["properties"]["field"]["sources"]} == {"trained", "untrained", "inputs"}
    trained, untrained = (np.load(folder / f"vectors/{name}.npy") for name in ("trained", "untrained"))
    assert trained.shape == untrained.shape == (len(TEXTS), CASE.layers + 1, CASE.hidden)
    assert np.abs(trained - untrained).max() > 0.1
    assert all((folder / name).stat().st_size > 5000 for name in ("retrieval.png", "probe.png"))
