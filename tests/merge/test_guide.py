"""Every command and recipe of docs/merging.md, in the guide's order, on small models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.support.documentation import ROOT, code_blocks, documented_commands
from tests.support.hf_folders import Model, convert, write_hf
from tools.merge.cli import main
from tools.merge.recipe_file import PARAMETERS, parse_recipe, read_recipe

pytestmark = pytest.mark.unit

GUIDE = "docs/merging.md"
ASTROSAGE = "configs/llama31_70b/merge.yml"
MODEL = Model(heads=8, kv_heads=4, head_dim=4)


def write_models(root: Path) -> None:
    """The models named in the recipes of the guide and of AstroSage, and checkpoints of a run."""
    names = ["cpt", "sft", "Llama-3.1-8B", "Llama-3.1-8B-Instruct", "Llama-3.1-70B-Instruct", "Llama-3.3-70B-Instruct"]
    names.append("Llama-3.1-Nemotron-70B-Instruct-HF")
    for seed, name in enumerate(names):
        write_hf(root / name, MODEL, MODEL.state(seed))
    (root / "checkpoints").mkdir()
    for seed, step in enumerate((100, 200, 300)):
        write_hf(root / f"hf{step}", MODEL, MODEL.state(seed))
        convert("to-neox", "--input", root / f"hf{step}", "--output", root / f"neox{step}", "--tp", 2)
        (root / f"neox{step}" / "global_step0").rename(root / "checkpoints" / f"global_step{step}")
    for name in ("cpt", "sft"):
        convert("to-neox", "--input", root / name, "--output", root / "checkpoints" / name, "--tp", 4)


def test_commands_of_the_guide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_models(tmp_path)
    blocks = [yaml.safe_load(text) for text in code_blocks(GUIDE, "yaml")]
    recipes = [block for block in blocks if "merge_method" in block]
    assert [recipe["merge_method"] for recipe in recipes] == ["dare_ties", "dare_ties", "average"]
    monkeypatch.chdir(tmp_path)
    Path("merge.yml").write_text(code_blocks(GUIDE, "yaml")[0])
    Path("own_base.yml").write_text(yaml.safe_dump(recipes[1]))
    Path("average.yml").write_text(yaml.safe_dump(recipes[2]))
    Path("configs").symlink_to(ROOT / "configs")
    prefix = "python tools/merge "
    commands = documented_commands(GUIDE)
    assert len(commands) >= 9
    for command in [*commands, f"{prefix}own_base.yml --output own_base"]:
        assert command.startswith(prefix)
        code = main([*command.removeprefix(prefix).split(), "--quiet"])
        printed = capsys.readouterr()
        assert code == 0, f"{command}\n{printed.err}"
    assert not list(tmp_path.glob("*.partial"))
    assert Path("merge.svg").stat().st_size > 1000
    card = Path("Llama-AstroSage-70B/README.md").read_text()
    assert card.startswith("---\nbase_model:\n- AstroSage-70B-CPT\n- AstroSage-70B-SFT\n")
    assert "license_name: llama3.1 and llama3.3" in card


def test_a_list_of_values_in_the_guide_is_understood() -> None:
    block = next(b for b in map(yaml.safe_load, code_blocks(GUIDE, "yaml")) if "weight" in b)
    body = {"merge_method": "linear", "models": [{"model": "m", "parameters": block}]}
    recipe = parse_recipe(body, "guide")
    at = {
        "model.layers.0.self_attn.q_proj.weight": 0.9,
        "model.layers.4.self_attn.q_proj.weight": 0.5,
        "model.layers.2.mlp.up_proj.weight": 0.6,
        "lm_head.weight": 0.7,
    }
    for tensor, weight in at.items():
        assert recipe.tensor_settings(tensor, 5).weights == pytest.approx((weight,))


def test_the_methods_of_the_guide_are_those_of_the_program() -> None:
    text = (ROOT / GUIDE).read_text()
    for method, (of_models, of_whole) in PARAMETERS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{method}` |"))
        if method != "dare_ties":
            for parameter in (of_models | of_whole) - {"int8_mask"}:
                assert f"`{parameter}`" in row, (method, parameter)


def test_the_recipe_of_astrosage() -> None:
    """The paper's weights, which add up to 1; everything not from the paper is marked."""
    recipe = read_recipe(ROOT / ASTROSAGE)
    settings = recipe.tensor_settings("model.norm.weight", 80)
    weights = dict(zip((m.parent.label for m in recipe.models), settings.weights, strict=True))
    assert weights == {
        "AstroSage-70B-SFT": 0.70,
        "nvidia/Llama-3.1-Nemotron-70B-Instruct-HF": 0.15,
        "meta-llama/Llama-3.3-70B-Instruct": 0.075,
        "meta-llama/Llama-3.1-70B-Instruct": 0.075,
    }
    assert sum(weights.values()) == pytest.approx(1)
    assert recipe.base is not None
    assert recipe.base.label == "AstroSage-70B-CPT"
    assert recipe.method == "dare_ties"
    assert not recipe.normalize
    lines = (ROOT / ASTROSAGE).read_text().splitlines()
    for key in ("merge_method:", "density:", "normalize:", "rescale:", "random_seed:", "out_dtype:", "side_files:"):
        number = next(i for i, line in enumerate(lines) if line.strip().startswith(key))
        assert re.search(r"\b(Ours|Paper)\b", lines[number - 1]), key
    uncommented = "\n".join(lines).replace("# base: {model", "base: {model")
    assert read_with_base(uncommented) == "meta-llama/Llama-3.1-70B"


def read_with_base(text: str) -> str:
    """The label of Nemotron's own base once its line is uncommented."""
    recipe = parse_recipe(yaml.safe_load(text), "recipe")
    (base,) = [m.base for m in recipe.models if m.base is not None]
    return base.label
