"""Outputs of a merge: a folder that transformers loads, a NeoX checkpoint that eval.py reads, a card, a report."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron.checkpoint.manifest import read_manifest
from tests.support.hf_folders import convert, read_hf
from tests.support.merges import PARENTS_MODEL, good_recipe, merge_to, run_merge, write_recipe
from tests.support.models import LLAMA3_ROPE, Case
from tests.support.token_files import random_documents
from tools.merge import masks

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


def test_transformers_loads_the_merged_model(tmp_path: Path) -> None:
    """Saved by transformers, merged, loaded by transformers: its logits are those of the merged weights."""
    from transformers import LlamaForCausalLM

    case = Case(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=48, vocab=96, seq=16, rope=LLAMA3_ROPE)
    models = [case.hugging_face(seed) for seed in range(3)]
    for name, model in zip(("base", "a", "b"), models, strict=True):
        model.save_pretrained(tmp_path / name)
    body = good_recipe(tmp_path)
    body["merge_method"] = "task_arithmetic"
    for entry in body["models"]:
        del entry["parameters"]["density"]
    out = merge_to(write_recipe(tmp_path / "merge.yml", body), tmp_path / "out")
    merged = LlamaForCausalLM.from_pretrained(out)
    states = [model.state_dict() for model in models]
    expected = case.hugging_face(0)
    expected.load_state_dict({n: b + 0.7 * (states[1][n] - b) + 0.3 * (states[2][n] - b) for n, b in states[0].items()})
    ids = torch.arange(16)[None]
    with torch.no_grad():
        assert float((merged(ids).logits - expected(ids).logits).abs().max()) < 1e-5


@pytest.mark.slow
def test_eval_gives_the_same_loss_on_both_ways_to_neox(tmp_path: Path) -> None:
    """Merge, convert, eval.py at TP 2; and merge directly to NeoX, eval.py at TP 1."""
    case = Case(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=48, vocab=96, seq=16, rope=LLAMA3_ROPE)
    for seed, name in enumerate(("base", "a", "b")):
        case.hugging_face(seed).save_pretrained(tmp_path / name)
    recipe = write_recipe(tmp_path / "merge.yml", good_recipe(tmp_path))
    convert("to-neox", "--input", merge_to(recipe, tmp_path / "hf"), "--output", tmp_path / "converted", "--tp", 2)
    merge_to(recipe, tmp_path / "direct", "--tp", 1)
    data = random_documents(tmp_path / "data", case.vocab)
    results = []
    for name, tp in (("converted", 2), ("direct", 1)):
        run = {
            "valid_data_paths": [data],
            "train_data_paths": [data],
            "seq_length": 16,
            "train_micro_batch_size_per_gpu": 2,
            "train_iters": 1,
            "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
            "precision": "fp32",
            "distributed_backend": "gloo",
            "load": str(tmp_path / name),
            "finetune": True,
            "model_parallel_size": tp,
            "eval_results_prefix": f"{tmp_path}/{name}_",
        }
        path = tmp_path / f"{name}.yml"
        path.write_text(yaml.safe_dump(run))
        command = ["deepy.py", "eval.py", str(tmp_path / name / "model.yml"), str(path), "--num_gpus", str(tp)]
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        results += json.loads((tmp_path / f"{name}_eval_results.json").read_text())["results"].values()
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-6)


def test_the_report_against_float64(folders: Path) -> None:
    body = good_recipe(folders)
    body["models"][1]["parameters"]["weight"] = -0.3
    out = merge_to(write_recipe(folders / "merge.yml", body | {"out_dtype": "float32"}), folders / "out")
    kinds = json.loads((out / "merge_report.json").read_text())["kinds"]
    base, a, b = (PARENTS_MODEL.state(seed) for seed in range(3))
    merged = read_hf(out)
    names = [n for n in base if "mlp.up_proj" in n]

    def together(state: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([(state[n].double() - base[n].double()).flatten() for n in names])

    da, db, dm = together(a), together(b), together(merged)
    row = kinds["MLP up"]
    assert row["elements"] == len(da)
    assert row["merged_delta_norm"] == pytest.approx(float(dm.norm()), rel=1e-5)
    assert row["conflicting_signs"] == pytest.approx(float((da * -db < 0).double().mean()), rel=1e-5)
    for label, delta in (("a", da), ("b", db)):
        model = row["models"][label]
        assert model["delta_norm"] == pytest.approx(float(delta.norm()), rel=1e-5)
        assert model["largest"] == pytest.approx(float(delta.max()), rel=1e-5)
        assert model["smallest"] == pytest.approx(float(delta.min()), rel=1e-5)
        assert model["beyond_working_range"] == pytest.approx(float((delta.abs() > 0.005).double().mean()), rel=1e-5)
        cosine = float(torch.dot(delta, dm) / delta.norm() / dm.norm())
        assert model["cosine_with_merged_delta"] == pytest.approx(cosine, abs=1e-5)
    assert kinds["all"]["elements"] == sum(k["elements"] for n, k in kinds.items() if n != "all")
    assert kinds["all"]["elements"] == sum(t.numel() for t in base.values())
    assert set(kinds) == {
        *("embedding", "query", "key", "value", "attention out", "MLP gate", "MLP up", "MLP down", "norms", "head"),
        "all",
    }


def test_warnings(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A delta beyond DARE's range, and a parent that is the base under another name."""
    body = good_recipe(folders)
    body["models"].append({"model": f"{folders}/a/../base", "parameters": {"weight": 0.1}})
    run_merge(write_recipe(folders / "merge.yml", body), "--output", folders / "out", expect=2)
    assert "base is base_model: its delta is zero" in capsys.readouterr().err
    shutil.copytree(folders / "base", folders / "copy")
    body["models"][-1] = {"model": str(folders / "copy"), "parameters": {"weight": 0.1}}
    merge_to(write_recipe(folders / "merge.yml", body), folders / "out")
    printed = capsys.readouterr().out
    assert "warning: copy is equal to the model that its delta is taken from" in printed
    assert re.search(r"warning: a: its delta reaches 0\.\d+, and \d+\.\d+% of it lies beyond 0.005", printed)


def test_card(folders: Path) -> None:
    """Names, licenses, seed, scheme and hashes; no local paths; its recipe reproduces the merge."""
    body = good_recipe(folders) | {"name": "Llama-Test"}
    body["models"][0] |= {"label": "org/a-model", "license": "llama3.1"}
    (folders / "b" / "README.md").write_text("---\nlicense: other\nlicense_name: llama3.3\n---\n# b\n")
    (folders / "b" / "LICENSE.txt").write_text("terms of b")
    (folders / "base" / "USE_POLICY.md").write_text("policy of base")
    out = merge_to(write_recipe(folders / "merge.yml", body), folders / "out")
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == ["b", "base", "org/a-model"]
    assert front["base_model_relation"] == "merge"
    assert front["license"] == "other"
    assert front["license_name"] == "llama3.1 and llama3.3 and unknown"
    assert "# Llama-Test" in card
    assert "Built with Llama." in card
    assert "| seed | 1 |" in card
    assert masks.SCHEME in card
    assert "`python tools/merge merge.yml --output out`" in card
    assert len(re.findall(r"`[0-9a-f]{64}`", card)) == 3
    for path in out.iterdir():
        if path.suffix != ".safetensors":
            assert str(folders) not in path.read_text(), path.name
    assert (out / "LICENSE.b.txt").read_text() == "terms of b"
    assert (out / "USE_POLICY.base.md").read_text() == "policy of base"
    assert (out / "LICENSE.txt").read_bytes() == (folders / "a" / "LICENSE.txt").read_bytes()

    again = yaml.safe_load((out / "merge.yml").read_text())
    assert again == yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    places = {"org/a-model": folders / "a", "b": folders / "b", "base": folders / "base"}
    for entry in (again["base_model"], *again["models"]):
        entry["model"] = str(places[entry["label"]])
    run_merge(write_recipe(folders / "again.yml", again), "--verify", out)
    manifest = read_manifest(out)
    assert manifest.provenance["written_by"] == "tools/merge"
    assert manifest.provenance["merge"]["masks"] == masks.SCHEME
    assert {"README.md", "merge_report.json", "merge.yml", "LICENSE.b.txt"} <= set(manifest.files)
    convert("verify", out)


def test_the_tokenizer_comes_from_the_right_model(folders: Path) -> None:
    """The model with a chat template and the largest weight, unless the recipe names another."""
    for name in ("base", "b"):
        (folders / name / "chat_template.jinja").unlink()
        (folders / name / "tokenizer_config.json").write_text("{}")
    (folders / "b" / "generation_config.json").write_text('{"of": "b"}')
    body = good_recipe(folders)
    body["models"][0]["parameters"]["weight"], body["models"][1]["parameters"]["weight"] = 0.2, 0.8
    out = merge_to(write_recipe(folders / "merge.yml", body), folders / "out")
    assert (out / "chat_template.jinja").read_bytes() == (folders / "a" / "chat_template.jinja").read_bytes()
    other = merge_to(write_recipe(folders / "merge.yml", body | {"side_files": "b"}), folders / "other")
    assert not (other / "chat_template.jinja").exists()
    assert json.loads((other / "generation_config.json").read_text()) == {"of": "b"}


def test_verify_finds_one_wrong_element(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    recipe = write_recipe(folders / "merge.yml", good_recipe(folders))
    out = merge_to(recipe, folders / "out")
    run_merge(recipe, "--verify", out)
    assert capsys.readouterr().out.endswith("EQUAL\n")
    name = "model.layers.0.mlp.down_proj.weight"
    for path in out.glob("*.safetensors"):
        state = load_file(path)
        if name in state:
            state[name][3, 5] += 0.25
            save_file(state, path, metadata={"format": "pt"})
    run_merge(recipe, "--verify", out, expect=1)
    printed = capsys.readouterr().out
    assert f"{name}: 1 elements differ, the first is element {3 * PARENTS_MODEL.intermediate + 5}" in printed
    assert printed.endswith("DIFFERENT\n")
    body: dict[str, Any] = good_recipe(folders) | {"out_dtype": "float32"}
    run_merge(write_recipe(folders / "merge.yml", body), "--verify", out, expect=2)
    assert "the recipe gives [50, 32] float32" in capsys.readouterr().err


def test_plan_writes_nothing(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(folders / "merge.yml", good_recipe(folders))
    run_merge(recipe, "--output", folders / "out", "--plan")
    printed = capsys.readouterr().out
    assert "weights of the final norm: a 0.7, b 0.3, sum 1" in printed
    assert re.search(r"reads [\d,]+ bytes, writes [\d,]+ bytes in 2 weight files", printed)
    assert not list(folders.glob("out*"))


def test_picture(folders: Path) -> None:
    recipe = write_recipe(folders / "merge.yml", good_recipe(folders))
    pictures = []
    for number in range(2):
        picture = folders / f"report{number}.svg"
        merge_to(recipe, folders / f"out{number}", "--picture", picture)
        pictures.append(picture.read_text())
    assert pictures[0] == pictures[1]
    for text in ("conflicting signs, %", "cosine with the merged delta", "MLP gate", ">a<", ">b<"):
        assert text in pictures[0]
