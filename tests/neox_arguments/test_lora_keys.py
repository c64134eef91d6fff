"""The key `lora`: values are derived from the adapter's folder; contradictions and unsupported values are rejected."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron.layout.peft_folder import CONFIG, WEIGHTS, PeftError, adapter_folder, read_adapter
from megatron.neox_arguments import ConfigError, NeoXArgs
from tests.support.configurations import keys

pytestmark = pytest.mark.unit

LAYERS = 4


def write_adapter(folder: Path, targets: tuple[str, ...] = ("q_proj", "v_proj"), rank: int = 2, **config: Any) -> Path:
    """A peft adapter for the model of the valid keys; `extra`, `without` and `ranks` modify its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    extra, without, ranks = config.pop("extra", []), config.pop("without", []), config.pop("ranks", {})
    given = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "bias": "none", "target_modules": list(targets)}
    (folder / CONFIG).write_text(json.dumps(given | config))
    tensors = {}
    for layer in range(LAYERS):
        for target in targets:
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            r = ranks.get(layer, rank)
            tensors[f"{prefix}.lora_A.weight"] = torch.zeros(r, 128)
            tensors[f"{prefix}.lora_B.weight"] = torch.zeros(128, r)
    kept = {name: tensor for name, tensor in tensors.items() if name not in without}
    save_file(kept | {name: torch.zeros(2, 2) for name in extra}, folder / WEIGHTS)
    return folder


def arguments(lora: dict[str, Any]) -> NeoXArgs:
    return NeoXArgs.from_dict(keys(lora=lora, from_scratch=None, load="runs/base"))


def test_adapter_settings_come_from_its_folder(tmp_path: Path) -> None:
    args = arguments({"load": str(write_adapter(tmp_path / "a", use_rslora=True))})
    assert args.lora is not None
    assert (args.lora.rank, args.lora.alpha, args.lora.rslora) == (2, 4.0, True)
    assert args.lora.projections == ("q_proj", "v_proj")
    assert args.lora.scale == pytest.approx(4 / 2**0.5)
    assert any("has rank 2, alpha 4, q_proj, v_proj" in note for note in args.notes)
    again = NeoXArgs.from_json(args.to_json())
    assert (again.lora, again.trained_shape) == (args.lora, args.trained_shape)


def test_additional_keys_must_agree_with_the_adapter(tmp_path: Path) -> None:
    folder = str(write_adapter(tmp_path / "a"))
    assert arguments({"load": folder, "rank": 2, "targets": ["v_proj", "q_proj"]}).lora is not None
    for name, value in (("rank", 3), ("alpha", 8), ("targets", ["q_proj"]), ("rslora", True)):
        with pytest.raises(ConfigError, match=rf"lora\.{name} is .*, but the adapter in lora\.load"):
            arguments({"load": folder, name: value})


def test_a_folder_that_only_the_nodes_see() -> None:
    lora = arguments({"load": "/nowhere/adapter", "rank": 2, "alpha": 4}).lora
    assert lora is not None
    assert len(lora.projections) == 7
    with pytest.raises(ConfigError, match=r"lora needs alpha, which cannot be read from lora\.load: /nowhere/adapter"):
        arguments({"load": "/nowhere/adapter", "rank": 2})


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"r": 2, "alpha": 4}, "r is peft's name; write rank"),
        ({"rank": 2, "lora_alpha": 4}, "lora_alpha is peft's name; write alpha"),
        ({"alpha": 4}, "lora needs rank; write lora: {rank: 16, alpha: 32}"),
        ({"rank": 0, "alpha": 4}, "lora.rank: given 0, but it should be greater than 0"),
        ({"rank": 2, "alpha": 4, "targets": []}, "lora.targets: given []"),
        ({"rank": 2, "alpha": 4, "targets": ["lm_head"]}, "lora.targets.0: given 'lm_head'"),
        ({"rank": 2, "alpha": 4, "rang": 3}, "unknown key lora.rang; did you mean rank?"),
        ({"rank": 2, "alpha": 4, "dropout": 0.05}, "the recomputation used here does not replay random states"),
        ({"rank": 2, "alpha": 4, "use_dora": True}, "DoRA is not supported"),
        (
            {"rank": 2, "alpha": 4, "modules_to_save": ["lm_head"]},
            "whole modules are not trained together with an adapter",
        ),
        ({"rank": 2, "alpha": 4, "load_in_4bit": True}, "a quantized base is not supported: it rounds every weight"),
        ({"rank": 2, "alpha": 4, "quantization": "nf4"}, "raise model_parallel_size"),
    ],
)
def test_invalid_input_is_rejected(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        arguments(lora)


def test_neutral_values_have_no_effect() -> None:
    plain = arguments({"rank": 2, "alpha": 4}).lora
    assert arguments({"rank": 2, "alpha": 4, "dropout": 0.0, "bias": "none", "load_in_4bit": False}).lora == plain


@pytest.mark.parametrize("name", ["load_in_4bit", "load_in_8bit", "quantization_config"])
def test_a_quantized_base_is_rejected(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: .* raise model_parallel_size"):
        NeoXArgs.from_dict(keys(**{name: {"bits": 4} if name == "quantization_config" else True}))


LAYER = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA is read"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"use_dora": True}, "use_dora is not understood here"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern is not understood here"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not understood here"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the base weights"),
        ({"lora_alpha": -1}, "lora_alpha must be a positive number"),
        ({"ranks": {3: 4}}, "an adapter of several ranks (rank_pattern) can be merged into its base, not trained"),
        ({"without": [LAYER]}, "layer 1 has no q_proj.lora_A"),
        ({"extra": ["base_model.model.lm_head.lora_A.weight"]}, "lm_head.lora_A.weight is no factor of q_proj"),
        ({"extra": ["base_model.model.model.embed_tokens.weight"]}, "embed_tokens.weight is no factor of q_proj"),
    ],
)
def test_adapters_that_are_not_understood_are_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "a", **changes)
    with pytest.raises(PeftError, match=re.escape(message)):
        read_adapter(folder)
    with pytest.raises(ConfigError, match=r"lora\.load: .*" + re.escape(message)):
        arguments({"load": str(folder)})


def test_folders_without_an_adapter_are_rejected(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / WEIGHTS).write_bytes(b"not safetensors")
    with pytest.raises(PeftError, match="is not a safetensors file"):
        read_adapter(folder)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(PeftError, match="save it again with safe_serialization=True"):
        read_adapter(folder)
    (folder / CONFIG).write_text("[]")
    (folder / WEIGHTS).touch()
    with pytest.raises(PeftError, match="holds a list, expected a mapping"):
        read_adapter(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(PeftError, match=r"adapter_config\.json is missing"):
        read_adapter(folder)


def test_a_run_folder_names_its_latest_adapter(tmp_path: Path) -> None:
    step = tmp_path / "run" / "global_step20"
    write_adapter(step / "adapter")
    (tmp_path / "run" / "latest").write_text("global_step20\n")
    for path in (tmp_path / "run", step, step / "adapter"):
        assert adapter_folder(path) == step / "adapter"
    assert adapter_folder(tmp_path / "nowhere") is None
