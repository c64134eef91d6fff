"""`to-hf --adapter`: the merged weights against float64 and peft, the reported rounding error, and invalid input."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.hf_folders import Model, convert, read_hf, same, write_hf
from tools.convert_hf.cli import main
from tools.convert_hf.commands.add_adapter import REPORT

pytestmark = pytest.mark.unit

MODEL = Model()
RANK, ALPHA = 3, 8
TARGETS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")


def write_adapter(folder: Path, model: Model, size: float = 0.1, **config: Any) -> dict[str, Tensor]:
    """A random adapter in peft's format; the change of each weight, in float64."""
    folder.mkdir(parents=True)
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "base_model_name_or_path": "base"}
    fields |= {"target_modules": [name.split(".")[1] for name in TARGETS], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    generator, tensors, changes = torch.Generator().manual_seed(5), {}, {}
    scale = ALPHA / (math.sqrt(RANK) if config.get("use_rslora") else RANK)
    for layer in range(model.layers):
        for target in TARGETS:
            name = f"model.layers.{layer}.{target}"
            rows, columns = model.state()[f"{name}.weight"].shape
            a = torch.randn(RANK, columns, generator=generator) * size
            b = torch.randn(rows, RANK, generator=generator) * size
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
            changes[f"{name}.weight"] = scale * b.double() @ a.double()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return changes


def expected(state: dict[str, Tensor], changes: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() + changes.get(name, torch.zeros(())) for name, tensor in state.items()}


@pytest.mark.parametrize("rslora", [False, True])
def test_the_sum_is_rounded_once_and_the_loss_is_printed(
    rslora: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = write_hf(tmp_path / "base", MODEL)
    changes = write_adapter(tmp_path / "lora", MODEL, use_rslora=rslora)
    exact = expected(state, changes)
    convert("to-hf", "--input", tmp_path / "base", "--adapter", tmp_path / "lora", "--output", tmp_path / "out")
    printed = capsys.readouterr().out
    found = read_hf(tmp_path / "out")
    assert same(found, {name: exact[name].to(tensor.dtype) for name, tensor in state.items()})
    report = json.loads((tmp_path / "out" / REPORT).read_text())["rounding_over_adapter"]
    assert report.keys() == changes.keys()
    for name, loss in report.items():
        true = float((found[name].double() - exact[name]).norm() / changes[name].norm())
        assert loss == pytest.approx(true, rel=1e-6)
        assert [name, f"{loss:.2e}"] in [line.split() for line in printed.splitlines()]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_float32_loses_nothing_that_float32_can_hold(tmp_path: Path) -> None:
    """A change far below half an ulp of bf16 vanishes in bf16, but is present in float32."""
    state = write_hf(tmp_path / "base", MODEL)
    changes = write_adapter(tmp_path / "lora", MODEL, size=1e-3)
    words = ("to-hf", "--input", tmp_path / "base", "--adapter", tmp_path / "lora")
    convert(*words, "--output", tmp_path / "bf16")
    convert(*words, "--output", tmp_path / "fp32", "--dtype", "float32")
    exact = expected(state, changes)
    fp32 = read_hf(tmp_path / "fp32")
    assert same(fp32, {name: tensor.float() for name, tensor in exact.items()})
    assert json.loads((tmp_path / "fp32" / "config.json").read_text())["torch_dtype"] == "float32"
    losses = [json.loads((tmp_path / out / REPORT).read_text())["rounding_over_adapter"] for out in ("bf16", "fp32")]
    assert all(losses[0][name] > 0.3 for name in changes)
    assert all(losses[1][name] < 2e-3 for name in changes)


def test_a_neox_base_and_any_split_of_the_work_give_the_same_bits(tmp_path: Path) -> None:
    write_hf(tmp_path / "base", MODEL, shards=2)
    write_adapter(tmp_path / "run/global_step7/adapter", MODEL)
    (tmp_path / "run/latest").write_text("global_step7\n")
    convert("to-neox", "--input", tmp_path / "base", "--output", tmp_path / "neox", "--tp", 2)
    words = ("to-hf", "--adapter", tmp_path / "run")
    convert(*words, "--input", tmp_path / "base", "--output", tmp_path / "one")
    convert(*words, "--input", tmp_path / "neox", "--output", tmp_path / "two", "--threads", 1, "--max-ram", "400MiB")
    for share in ("1/2", "2/2"):
        convert(*words, "--input", tmp_path / "base", "--output", tmp_path / "three", "--shard", share)
    one = read_hf(tmp_path / "one")
    assert same(one, read_hf(tmp_path / "two"))
    assert same(one, read_hf(tmp_path / "three"))
    assert (tmp_path / "one" / REPORT).read_text() == (tmp_path / "three" / REPORT).read_text()


def test_merged_weights_equal_peft(tmp_path: Path) -> None:
    import peft
    from transformers import LlamaForCausalLM

    model = replace(MODEL, dtype=torch.float32)
    state = write_hf(tmp_path / "base", model)
    write_adapter(tmp_path / "lora", model)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(loaded, str(tmp_path / "lora")).merge_and_unload().state_dict()
    convert("to-hf", "--input", tmp_path / "base", "--adapter", tmp_path / "lora", "--output", tmp_path / "out")
    ours = read_hf(tmp_path / "out")
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in state) <= 1e-7


@pytest.mark.parametrize(
    ("words", "config", "message"),
    [
        (
            (),
            {"base_model_name_or_path": "org/other-8B"},
            "If that is the same model, give --adapter-base org/other-8B",
        ),
        ((), {"use_dora": True}, "use_dora is not understood here; merge the adapter with peft first"),
        (("--adapter", "nothing"), {}, "is missing; an adapter is a folder that peft's save_pretrained wrote"),
    ],
)
def test_invalid_input_is_rejected(
    words: tuple[str, ...],
    config: dict[str, Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_hf(tmp_path / "base", MODEL)
    write_adapter(tmp_path / "lora", MODEL, **config)
    given = ["to-hf", "--input", str(tmp_path / "base"), "--output", str(tmp_path / "out"), "--quiet"]
    assert main([*given, "--adapter", str(tmp_path / "lora"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_name_of_the_base_can_be_stated(tmp_path: Path) -> None:
    write_hf(tmp_path / "base", MODEL)
    write_adapter(tmp_path / "lora", MODEL, base_model_name_or_path="org/other-8B")
    words = ("to-hf", "--input", tmp_path / "base", "--output", tmp_path / "out", "--adapter-base", "org/other-8B")
    convert(*words, expect=2)  # without an adapter it says nothing
    convert(*words, "--adapter", tmp_path / "lora")
