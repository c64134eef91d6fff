"""Methods compared with float64: models with their own base, averages of a run, exact trimming, l1, adapters."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.hf_folders import convert, read_hf, write_hf
from tests.support.merge_sets import SETS, noise, parent_state, recipes, write_set
from tests.support.merges import merge_to, merged_state, write_recipe
from tests.support.requirements import need
from tools.merge.arithmetic import Trim, slerp_coefficients, trim_mask
from tools.merge.masks import keep_mask, mask_key, threshold

pytestmark = pytest.mark.unit

NAME = "gqa-fp32"
MODEL = SETS[NAME][0]


def double(number: int) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in parent_state(NAME, number).items()}


def close(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-7) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((ours[name].double() - tensor).abs().max()) <= tolerance, name


def test_a_model_with_its_own_base(tmp_path: Path) -> None:
    """m1 is a fine-tune of the base, m2 an instruct model whose delta is to m3: the base keeps what it learned."""
    write_set(tmp_path, NAME)
    body: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [
            {"model": str(tmp_path / "m1"), "parameters": {"weight": 0.7}},
            {"model": str(tmp_path / "m2"), "base": str(tmp_path / "m3"), "parameters": {"weight": 0.3}},
        ],
        "out_dtype": "float32",
    }
    base, one, two, three = (double(i) for i in range(4))
    close(merged_state(body), {n: b + 0.7 * (one[n] - b) + 0.3 * (two[n] - three[n]) for n, b in base.items()})
    del body["models"][1]["base"]
    close(merged_state(body), {n: b + 0.7 * (one[n] - b) + 0.3 * (two[n] - b) for n, b in base.items()})


@pytest.mark.parametrize(
    ("parameters", "weights"),
    [
        ({}, (1, 1, 1)),
        ({"weighting": "linear"}, (1, 2, 3)),
        ({"weighting": "ema", "decay": 0.5}, (0.25, 0.5, 1)),
    ],
)
def test_averages_of_a_run(parameters: dict[str, Any], weights: tuple[float, ...], tmp_path: Path) -> None:
    """Checkpoints of steps 20, 100 and 1000, whose names do not sort numerically."""
    run = tmp_path / "run"
    states = {}
    for number, step in enumerate((20, 100, 1000)):
        states[step] = {
            n: t.double() for n, t in write_hf(tmp_path / f"hf{step}", MODEL, parent_state(NAME, number)).items()
        }
        convert("to-neox", "--input", tmp_path / f"hf{step}", "--output", tmp_path / f"neox{step}", "--tp", 1)
        run.mkdir(exist_ok=True)
        (tmp_path / f"neox{step}" / "global_step0").rename(run / f"global_step{step}")
    body = {"merge_method": "average", "checkpoints": str(run), "last": 3, "parameters": parameters}
    expected = {
        name: sum(w * states[s][name] for w, s in zip(weights, states, strict=True)) / sum(weights)  # type: ignore[misc]
        for name in states[20]
    }
    close(merged_state(body), expected)
    steps = {key: value for key, value in body.items() if key != "last"} | {"steps": [100, 20]}
    two = {n: (weights[0] * states[20][n] + weights[1] * states[100][n]) / sum(weights[:2]) for n in expected}
    close(merged_state(steps), two)


def test_l1_gives_back_the_sum_of_magnitudes(tmp_path: Path) -> None:
    """`rescale: l1` compared with float64, with independently drawn masks."""
    write_set(tmp_path, NAME)
    body = recipes(tmp_path, NAME)["dare_linear 0.53"] | {"random_seed": 3, "out_dtype": "float32"}
    body["parameters"] = {"rescale": "l1"}
    base = double(0)
    expected = dict(base)
    for number, entry in enumerate(body["models"], 1):
        for name, tensor in double(number).items():
            delta = tensor - base[name]
            key = mask_key(3, name, f"m{number}")
            mask = torch.from_numpy(keep_mask(key, 0, delta.numel(), threshold(0.53))).view(delta.shape)
            factor = delta.abs().sum() / (delta * mask).abs().sum()
            expected[name] = expected[name] + entry["parameters"]["weight"] * factor * delta * mask
    close(merged_state(body), expected)


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.999])
def test_ties_keeps_exactly_the_largest(density: float, tmp_path: Path) -> None:
    """One model of weight 1: the result is the model where its delta is among the k largest, the base elsewhere."""
    write_set(tmp_path, "gqa")
    body = recipes(tmp_path, "gqa")["ties 0.5"] | {"out_dtype": "float32"}
    body["models"] = [{"model": str(tmp_path / "m1"), "parameters": {"weight": 1.0, "density": density}}]
    merged = merged_state(body)
    base, model = parent_state("gqa", 0), parent_state("gqa", 1)
    for name, tensor in merged.items():
        delta = (model[name].float() - base[name].float()).flatten()
        k = max(1, int(density * delta.numel()))
        kept = (tensor.flatten() - base[name].float().flatten()) != 0
        order = torch.argsort(delta.abs(), descending=True, stable=True)[:k]  # equal magnitudes in order of position
        expected = torch.zeros_like(kept)
        expected[order] = delta[order] != 0
        assert torch.equal(kept, expected), name


def test_trimming_counts_equal_magnitudes() -> None:
    """Six of ten equal magnitudes are kept: the first six, wherever a tile begins."""
    magnitudes = torch.tensor([2.0, 1, 1, 0, 1, 1, 1, 1, 3, 1, 1, 1, 1])
    trim = Trim(1.0, last=7)  # of the elements equal to 1: numbers 1, 2, 4, 5, 6 and 7
    whole = trim_mask(trim, magnitudes, 0, torch.empty(13, dtype=torch.bool))
    assert torch.nonzero(whole).flatten().tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    for size in (1, 2, 5, 8):
        parts = [
            trim_mask(trim, part, i * size, torch.empty(len(part), dtype=torch.bool))
            for i, part in enumerate(magnitudes.split(size))
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_slerp_coefficients() -> None:
    """Orthogonal tensors meet at 45 degrees; parallel ones are interpolated."""
    assert slerp_coefficients(0.5, 4.0, 9.0, 0.0) == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)))
    assert slerp_coefficients(0.25, 1.0, 1.0, 1.0) == (0.75, 0.25)
    assert slerp_coefficients(0.25, 0.0, 1.0, 0.0) == pytest.approx((math.sin(0.375 * math.pi), math.sin(math.pi / 8)))


# --- adapters

ADAPTED = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
RANK, ALPHA = 3, 8


def write_adapter(folder: Path, base_name: str, seed: int = 0, **config: Any) -> dict[str, Tensor]:
    """A peft folder for MODEL; returns the delta of each weight in float64."""
    folder.mkdir()
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [name.split(".")[1] for name in ADAPTED],
        "use_rslora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    tensors, deltas = {}, {}
    for layer in range(MODEL.layers):
        for module in ADAPTED:
            name = f"model.layers.{layer}.{module}"
            rows, cols = parent_state(NAME, 0)[f"{name}.weight"].shape
            a = torch.from_numpy(0.1 * noise(f"{seed} a {name}", (RANK, cols))).float()
            b = torch.from_numpy(0.1 * noise(f"{seed} b {name}", (rows, RANK))).float()
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
            scale = ALPHA / (math.sqrt(RANK) if config.get("use_rslora") else RANK)
            deltas[f"{name}.weight"] = scale * b.double() @ a.double()
    save_file(tensors, folder / "adapter_model.safetensors")
    return deltas


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_are_base_and_delta(rslora: bool, tmp_path: Path) -> None:
    write_set(tmp_path, NAME)
    deltas = write_adapter(tmp_path / "lora", "org/base", use_rslora=rslora)
    body = {
        "merge_method": "linear",
        "models": [
            {"model": f"{tmp_path / 'base'}+{tmp_path / 'lora'}", "parameters": {"weight": 3}},
            {"model": str(tmp_path / "m1"), "parameters": {"weight": 1}},
        ],
        "out_dtype": "float32",
    }
    base, one = double(0), double(1)
    expected = {n: 0.75 * (b + deltas.get(n, torch.zeros(()))) + 0.25 * one[n] for n, b in base.items()}
    close(merged_state(body), expected)
    # Tiles of one row give the same bits as the whole: no matrix product is involved.
    small, large = merged_state(body, tile=1), merged_state(body, tile=1 << 16)
    assert all(torch.equal(small[n], large[n]) for n in small)


def test_merging_an_adapter_equals_peft(tmp_path: Path) -> None:
    """The base with its adapter alone, against peft's merge_and_unload."""
    try:
        import peft
    except ImportError:
        peft = None
    need("peft", peft is not None, "pip install peft")
    from transformers import LlamaForCausalLM

    write_hf(tmp_path / "base", MODEL, parent_state(NAME, 0))
    write_adapter(tmp_path / "lora", "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "lora")).merge_and_unload().state_dict()
    recipe = write_recipe(
        tmp_path / "merge.yml",
        {
            "merge_method": "linear",
            "models": [
                {
                    "model": str(tmp_path / "base"),
                    "adapter": str(tmp_path / "lora"),
                    "parameters": {"weight": 1},
                }
            ],
        },
    )
    close(read_hf(merge_to(recipe, tmp_path / "out")), {n: theirs[n].double() for n in parent_state(NAME, 0)})


def test_bf16_parents_are_merged_in_fp32(tmp_path: Path) -> None:
    """The merged delta of bf16 parents is within one rounding of the float64 result; bf16 arithmetic is not."""
    root = tmp_path
    write_set(root, "gqa")
    body = recipes(root, "gqa")["task_arithmetic"]
    base, models = parent_state("gqa", 0), [parent_state("gqa", i) for i in range(1, 5)]
    weights = [entry["parameters"]["weight"] for entry in body["models"]]
    for name, tensor in merged_state(body).items():
        exact = base[name].double()
        exact = exact + sum(w * (m[name].double() - base[name].double()) for w, m in zip(weights, models, strict=True))
        half_step = 2.0 ** (torch.floor(torch.log2(exact.abs())) - 8)
        assert bool(((tensor.double() - exact).abs() <= half_step * 1.001).all()), name
