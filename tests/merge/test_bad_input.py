"""Impossible merges stop with one message, before anything is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.hf_folders import Model, convert, write_hf
from tests.support.merges import PARENTS_MODEL, good_recipe, run_merge, write_recipe
from tools.merge.cli import main
from tools.merge.recipe_file import parse_recipe

pytestmark = pytest.mark.unit


def refused(root: Path, body: Any, message: str, capsys: pytest.CaptureFixture[str], *words: Any) -> None:
    """One line on stderr, exit code 2, and no output."""
    before = sorted(path.name for path in root.iterdir())
    recipe = write_recipe(root / "merge.yml", body)
    capsys.readouterr()
    run_merge(recipe, "--output", root / "out", *words, expect=2)
    printed = capsys.readouterr().err
    assert printed.startswith("merge: ")
    assert printed.count("\n") == 1, printed
    assert re.search(message, printed), printed
    assert sorted({path.name for path in root.iterdir()} - {"merge.yml"}) == [n for n in before if n != "merge.yml"]


Change = Callable[[dict[str, Any]], Any]


def put(*path: Any) -> Change:
    """Set the value at the end of a path of keys: the last two are key and value."""
    *way, key, value = path

    def change(body: dict[str, Any]) -> None:
        for step in way:
            body = body[step]
        body[key] = value

    return change


A = ("models", 0)
RECIPES: list[tuple[Change, str]] = [
    (put("merge_method", "della"), "merge_method 'della' is not one of .*mergekit has it"),
    (put("merge_method", "average_all"), "merge_method 'average_all' is not one of"),
    (put("merge_method", ["ties"]), "merge_method .* is not one of"),
    (put("slices", []), "slices is not supported"),
    (put("tokenizer", {"source": "union"}), "tokenizer is not supported"),
    (put("chat_template", "auto"), "chat_template is not supported"),
    (put("seed", 7), "unknown key seed; known are .*random_seed"),
    (put("random_seed", -1), "random_seed must be a whole number"),
    (put("random_seed", True), "random_seed must be a whole number"),
    (put("models", []), "models must be a list"),
    (put("models", "a"), "models must be a list"),
    (put("models", [3]), "must be a mapping"),
    (put("base_model", None), "dare_ties needs base_model"),
    (put("base_model", "org/Llama"), "org/Llama is not a folder. .* download it"),
    (put(*A, "model", 3), "model must be the path of a folder"),
    (put(*A, "weight", 0.5), "unknown key weight"),
    (put(*A, "parameters", {}), "a, tensor .*: no weight"),
    (put(*A, "parameters", "weight", 0), "a: its weight is 0 everywhere"),
    (put(*A, "parameters", "weight", [0, 0.0]), "a: its weight is 0 everywhere"),
    (put(*A, "parameters", "weight", "heavy"), "weight must be a finite number"),
    (put(*A, "parameters", "weight", float("nan")), "weight must be a finite number"),
    (put(*A, "parameters", "weight", True), "weight must be a finite number"),
    (put(*A, "parameters", "weight", []), "weight is an empty list"),
    (put(*A, "parameters", "weight", [{"filter": "mlp"}]), "must be a number, or a mapping with `value`"),
    (put(*A, "parameters", "weight", [{"filter": "mpl", "value": 1}, {"value": 2}]), "no tensor's name contains 'mpl'"),
    (
        put(*A, "parameters", "weight", [{"filter": "mlp", "value": 1}]),
        "a, tensor .*: no weight",
    ),
    (put(*A, "parameters", "density", 0), r"density 0 must be above 0 and at most 1"),
    (put(*A, "parameters", "density", 1.5), "density 1.5 must be above 0 and at most 1"),
    (put(*A, "parameters", "density", [0.5, 1.1]), "density 1.1 must be"),
    (put(*A, "parameters", "density", 1e-6), "below 1/65536, the resolution of the masks"),
    (put(*A, "parameters", "gamma", 0.01), "gamma is not a parameter of a model in dare_ties"),
    (put("parameters", "epsilon", 0.1), "epsilon is not a parameter of dare_ties"),
    (put("parameters", "normalize", "yes"), "normalize must be true or false"),
    (put("parameters", "rescale", "l2"), "rescale must be probability, l1"),
    (put("parameters", []), "parameters must be a mapping|is not one of"),
    (put("dtype", "int8"), "dtype must be one of"),
    (put("side_files", "c"), "side_files 'c' is not one of the models .*base"),
    (put("name", "two\nlines"), "name must be a line of text"),
]


@pytest.mark.parametrize(("change", "message"), RECIPES, ids=[m[:32] for _, m in RECIPES])
def test_recipes(change: Change, message: str, folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = good_recipe(folders)
    change(body)
    if body["parameters"] == []:
        body["parameters"] = [1]
    refused(folders, body, message, capsys)


def test_the_unmodified_recipe_is_valid(folders: Path) -> None:
    run_merge(write_recipe(folders / "merge.yml", good_recipe(folders)), "--output", folders / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: ties\nmerge_method: linear\n", "'merge_method' appears twice"),
        ("a: [1\n", "is not valid YAML"),
        ("", "must be a mapping"),
        ("- 1\n", "must be a mapping"),
        ("!!python/object/apply:os.system ['true']\n", "is not valid YAML"),
        ("? [1]\n: 2\n", "is not valid YAML"),
        ("1: 2\n", "must be a mapping with text keys"),
    ],
)
def test_yaml(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "merge.yml").write_text(text)
    assert main([str(tmp_path / "merge.yml"), "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_no_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.yml"), "--output", str(tmp_path / "out")]) == 2
    assert "none.yml cannot be read: No such file" in capsys.readouterr().err
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00")
    assert main([str(tmp_path / "binary.yml"), "--output", str(tmp_path / "out")]) == 2
    assert "it is not text" in capsys.readouterr().err


def test_roles(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = good_recipe(folders)
    twice = body["models"] + [body["models"][0]]
    refused(folders, body | {"models": twice}, "a appears twice among the models", capsys)
    itself = [{"model": str(folders / "base"), "parameters": {"weight": 1}}, *body["models"]]
    refused(folders, body | {"models": itself}, "base is base_model: its delta is zero", capsys)
    refused(folders, body | {"models": [str(folders / "base")]}, "there is no model other than base_model", capsys)
    own = [{"model": str(folders / "a"), "base": str(folders / "a"), "parameters": {"weight": 1}}]
    refused(folders, body | {"models": own}, "a is its own base", capsys)
    same_name = folders / "x" / "a"
    shutil.copytree(folders / "b", same_name)
    clash = [body["models"][0], {"model": str(same_name), "parameters": {"weight": 1}}]
    refused(folders, body | {"models": clash}, "both have the label 'a'; give one another `label`", capsys)
    linear = {"merge_method": "linear", "base_model": str(folders / "base"), "models": body["models"][:1]}
    del linear["models"][0]["parameters"]["density"]
    refused(folders, linear, "linear does not use base_model", capsys)
    slerp = {"merge_method": "slerp", "base_model": str(folders / "base"), "parameters": {"t": 0.5}}
    both = [str(folders / "a"), str(folders / "b")]
    refused(folders, slerp | {"models": both}, "slerp merges base_model and one other model, but 2 others", capsys)
    refused(folders, slerp | {"models": both[:1], "parameters": {"t": 1.5}}, "slerp's t is 1.5", capsys)
    refused(folders, slerp | {"models": both[:1], "parameters": {}}, "slerp's t is missing", capsys)
    opposite = [
        {"model": str(folders / "a"), "parameters": {"weight": 1}},
        {"model": str(folders / "b"), "parameters": {"weight": -1}},
    ]
    refused(folders, {"merge_method": "linear", "models": opposite}, "the weights add up to 0", capsys)


def test_averages(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folders / "run"
    for step in (10, 20):
        (run / f"global_step{step}").mkdir(parents=True)
    body: dict[str, Any] = {"merge_method": "average", "checkpoints": str(run)}
    refused(folders, body, "needs either steps", capsys)
    refused(folders, body | {"last": 2, "steps": [10, 20]}, "needs either steps", capsys)
    refused(folders, body | {"last": 3}, "at most the 2 checkpoints found", capsys)
    refused(folders, body | {"last": 1}, "expected 2 or more", capsys)
    refused(folders, body | {"steps": [10, 30]}, r"no checkpoint of step 30; found: \[10, 20\]", capsys)
    refused(folders, body | {"steps": [10, 10]}, "two different iterations", capsys)
    refused(folders, body | {"last": 2, "parameters": {"weighting": "median"}}, "weighting must be one of", capsys)
    refused(folders, body | {"last": 2, "parameters": {"weighting": "ema"}}, "decay must be a finite number", capsys)
    ema = {"weighting": "ema", "decay": 1}
    refused(folders, body | {"last": 2, "parameters": ema}, "must be between 0 and 1", capsys)
    refused(folders, body | {"last": 2, "parameters": {"decay": 0.5}}, "decay applies to weighting ema", capsys)
    refused(folders, body | {"last": 2, "models": []}, "unknown key models", capsys)
    refused(folders, body | {"checkpoints": "nowhere", "last": 2}, "nowhere is not a folder", capsys)
    refused(folders, body | {"last": 2}, "global_step10", capsys)  # empty


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_incompatible_parents_are_rejected(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = good_recipe(folders)

    def other(message: str, model: Model = PARENTS_MODEL, **config: Any) -> None:
        shutil.rmtree(folders / "b")
        write_hf(folders / "b", model)
        change_config(folders / "b", **config)
        refused(folders, body, message, capsys)

    other("num_layers is 2 in base and 3 in b", Model(layers=3))
    other("intermediate_size is 24 in base and 32 in b", Model(intermediate=32))
    other("num_kv_heads is 2 in base and 4 in b", Model(kv_heads=4))
    other("the vocabulary has 50 tokens in base and 51 in b", Model(vocab=51))
    other("tied is False in base and True in b", Model(tied=True))
    other("rms_norm_epsilon is 1e-05 in base and 1e-06 in b", rms_norm_eps=1e-6)
    other("rotary_emb_base is 500000.0 in base and 10000.0 in b", rope_theta=10000.0)
    other("rope_scaling is .* in base and null in b", rope_scaling=None)


def test_settings_of_training(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A NeoX parent trained with an epsilon that differs from its config.json, or without a recorded one."""
    convert("to-neox", "--input", folders / "b", "--output", folders / "neox", "--tp", 2)
    body = good_recipe(folders)
    body["models"][1]["model"] = str(folders / "neox")
    model_yml = folders / "neox" / "model.yml"
    text = model_yml.read_text()
    model_yml.write_text(text.replace("rms_norm_epsilon: 1.0e-05", "rms_norm_epsilon: 1.0e-06"))
    refused(folders, body, "neox: rms_norm_epsilon is 1e-06 in .*model.yml, but 1e-05 in .*config.json", capsys)
    model_yml.unlink()
    shutil.rmtree(folders / "neox" / "global_step0" / "hf")
    (folders / "neox" / "global_step0" / "manifest.json").unlink()
    refused(folders, body, "neox: no file at .* gives its epsilon .*add `hf_source: DIR`", capsys)
    body["models"][1]["hf_source"] = str(folders / "b")
    run_merge(write_recipe(folders / "merge.yml", body), "--output", folders / "out")


def test_fields_that_config_json_lacks(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The converter's --set is a key of the recipe, and the message says so."""
    path = folders / "b" / "config.json"
    fields = json.loads(path.read_text())
    scaling = fields.pop("rope_scaling")
    path.write_text(json.dumps(fields))
    body = good_recipe(folders)
    refused(folders, body, "b: .*rope_scaling is missing .*add `set: {rope_scaling: null .*}` beside the model", capsys)
    body["models"][1]["set"] = {"rope_scaling": scaling}
    run_merge(write_recipe(folders / "merge.yml", body), "--output", folders / "out")
    body["models"][1]["set"] = {"rope_scaling": {1, 2}}
    refused(folders, body, "set must be representable in config.json", capsys)


def test_types_that_neox_keeps_in_one_tensor(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (folders / "base").glob("*.safetensors"):
        state = load_file(path)
        state = {n: t.float() if "q_proj" in n else t for n, t in state.items()}
        save_file(state, path, metadata={"format": "pt"})
    body = good_recipe(folders)
    refused(folders, body, "base holds bfloat16 and float32; give out_dtype to write for NeoX", capsys, "--tp", 2)
    recipe = write_recipe(folders / "merge.yml", body | {"out_dtype": "bfloat16"})
    run_merge(recipe, "--output", folders / "out", "--tp", 2)


def test_a_base_by_path_or_label(folders: Path) -> None:
    """A model's own base may be described elsewhere in the recipe."""
    described = {"model": str(folders / "b"), "label": "org/b", "license": "llama3.1"}
    for short in (str(folders / "b"), "org/b"):
        body = good_recipe(folders)
        body["models"] = [
            {"model": str(folders / "a"), "base": short, "parameters": {"weight": 0.5}},
            described | {"parameters": {"weight": 0.5}},
        ]
        recipe = parse_recipe(body, "recipe")
        assert recipe.models[0].base == recipe.models[1].parent
        assert [parent.label for parent in recipe.parents] == ["base", "a", "org/b"]
    body["models"][1] = {"model": str(folders / "lora"), "base": described, "parameters": {"weight": 0.5}}
    assert parse_recipe(body, "recipe").models[0].base == parse_recipe(body, "recipe").models[1].base


def tokenizer(**changes: Any) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
        "added_tokens": [{"id": 3, "content": "<|eot|>", "special": True}],
        "pre_tokenizer": {"type": "ByteLevel"},
        "post_processor": None,
    }
    return body | changes


def test_tokenizers(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A different notation or post-processor is the same tokenizer; a different id is not."""
    body = good_recipe(folders)
    files = {name: folders / name / "tokenizer.json" for name in ("base", "a", "b")}
    for path in files.values():
        path.write_text(json.dumps(tokenizer()))
    same = tokenizer(post_processor={"type": "TemplateProcessing"})
    same["model"] = same["model"] | {"merges": [["a", "b"]]}
    files["b"].write_text(json.dumps(same, indent=2))
    run_merge(write_recipe(folders / "merge.yml", body), "--output", folders / "out")
    shutil.rmtree(folders / "out")

    model = tokenizer()["model"]
    files["b"].write_text(json.dumps(tokenizer(model=model | {"vocab": {"a": 0, "b": 2, "ab": 1}})))
    refused(folders, body, "different tokenizers .*: 2 tokens, such as 'ab' with id 2 and 1", capsys)
    files["b"].write_text(json.dumps(tokenizer(added_tokens=[{"id": 3, "content": "<|end|>"}])))
    refused(folders, body, "2 tokens, such as '<|end|>' with id None and 3".replace("|", r"\|"), capsys)
    files["b"].write_text(json.dumps(tokenizer(model=model | {"merges": ["b a"]})))
    refused(folders, body, "different tokenizers .*: their merges", capsys)
    files["b"].write_text(json.dumps(tokenizer(pre_tokenizer=None)))
    refused(folders, body, "different tokenizers .*: their pre_tokenizer", capsys)
    files["b"].write_text("{")
    refused(folders, body, "tokenizer.json is not valid JSON", capsys)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("label", ["base", "b"])
def test_a_parent_with_a_nonfinite_value_is_rejected(
    value: float, label: str, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found during the merge; there is no output, and the message gives the location."""
    for path in (folders / label).glob("*.safetensors"):
        state = load_file(path)
        if "model.layers.1.mlp.up_proj.weight" in state:
            state["model.layers.1.mlp.up_proj.weight"][5, 7] = value
            save_file(state, path, metadata={"format": "pt"})
    run_merge(write_recipe(folders / "merge.yml", good_recipe(folders)), "--output", folders / "out", expect=2)
    printed = capsys.readouterr().err
    assert f"{label}: model.layers.1.mlp.up_proj.weight holds {value} at row 5, column 7" in printed
    assert not (folders / "out").exists()


def test_values_that_fp16_cannot_hold(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = good_recipe(folders) | {"out_dtype": "float16"}
    body["models"] = [{"model": str(folders / "a"), "parameters": {"weight": 1e7}}]
    run_merge(write_recipe(folders / "merge.yml", body), "--output", folders / "out", expect=2)
    assert "too large for float16" in capsys.readouterr().err


def test_missing_shards(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folders / "a" / "model-00002-of-00002.safetensors").unlink()
    refused(folders, good_recipe(folders), "model-00002-of-00002.safetensors is missing", capsys)


ADAPTERS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    ({"bias": "all"}, "bias is 'all'"),
    ({"use_dora": True}, "use_dora is not understood here"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is not understood"),
    ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern is not understood"),
    ({"some_new_switch": 1}, "some_new_switch is not understood"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the base"),
    ({"lora_alpha": None}, "lora_alpha must be a positive number"),
    ({"base_model_name_or_path": "org/other-8B"}, "was trained on 'org/other-8B'.*write `adapter_base: org/other-8B`"),
]


@pytest.mark.parametrize(("config", "message"), ADAPTERS)
def test_adapters(config: dict[str, Any], message: str, folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = good_recipe(folders)
    body["models"].append({"model": f"{folders / 'base'}+{folders / 'lora'}", "parameters": {"weight": 1}})
    path = folders / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    refused(folders, body, message, capsys)


def test_adapters_of_another_base(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = good_recipe(folders)
    entry: dict[str, Any] = {
        "model": str(folders / "base"),
        "adapter": str(folders / "lora"),
        "parameters": {"weight": 1},
    }
    body["models"].append(entry)
    weights = folders / "lora" / "adapter_model.safetensors"
    prefix = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"

    def with_factors(factors: dict[str, tuple[int, int]], message: str) -> None:
        save_file({name: torch.ones(shape) for name, shape in factors.items()}, weights)
        refused(folders, body, message, capsys)

    with_factors({prefix.format(0, "A"): (2, 64), prefix.format(0, "B"): (32, 2)}, "another base")
    with_factors({prefix.format(7, "A"): (2, 32), prefix.format(7, "B"): (32, 2)}, "not a tensor of the model")
    with_factors({prefix.format(0, "A"): (2, 32)}, "only one of its two factors")
    with_factors({"base_model.model.lm_head.weight": (50, 32)}, "is not a factor of a linear layer")
    weights.unlink()
    refused(folders, body, "adapter_model.safetensors is missing", capsys)
    entry["adapter"] = str(folders / "nothing")
    refused(folders, body, "adapter_config.json is missing", capsys)
    del entry["adapter"]
    entry["adapter_base"] = "base"
    entry["model"] = str(folders / "b")
    refused(folders, body | {"models": [entry]}, "adapter_base without an adapter", capsys)


def test_limits_of_the_command(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    little = "--max-ram 200 MiB is too little for 3 models; give at least"
    refused(folders, good_recipe(folders), little, capsys, "--max-ram", "200MiB")
    refused(folders, good_recipe(folders), "--tp 3 does not fit this model", capsys, "--tp", 3)
    refused(
        folders, good_recipe(folders), "--picture: .* must end in one of .png", capsys, "--picture", folders / "x.gif"
    )
    recipe = write_recipe(folders / "merge.yml", good_recipe(folders))
    for output in (folders / "a", folders / "a" / "merged", folders):
        for force in ([], ["--force"], ["--plan"]):
            run_merge(recipe, "--output", output, *force, expect=2)
            assert re.search(r"--output \S+ is, holds or lies in \S+, which is", capsys.readouterr().err)
    assert (folders / "a" / "config.json").is_file()
    run_merge(recipe, "--output", folders / "out")
    run_merge(recipe, "--output", folders / "out", expect=2)
    assert "replace it with --force" in capsys.readouterr().err
    run_merge(recipe, "--output", folders / "out", "--force")


def test_mergekits_forms_are_read(folders: Path) -> None:
    """A model as a mapping with a path, the base among the models, parameters of all models at the top."""
    body = {
        "merge_method": "ties",
        "base_model": {"model": {"path": str(folders / "base")}},
        "models": [{"model": str(folders / "base")}, {"model": {"path": str(folders / "a")}}, str(folders / "b")],
        "parameters": {"weight": 0.5, "density": "5e-1", "int8_mask": True},
        "tokenizer_source": "base",
        "dtype": "bfloat16",
    }
    recipe = parse_recipe(body, "recipe")
    assert [m.parent.label for m in recipe.models] == ["a", "b"]
    settings = recipe.tensor_settings("model.norm.weight", 2)
    assert settings.weights == settings.densities == (0.5, 0.5)
    assert recipe.side_files == "base"
    assert recipe.normalize
    assert any("int8_mask" in note for note in recipe.notes)
