"""`inspect --serving`: whether an exported folder has what vLLM, SGLang and llama.cpp need.

No weights are loaded and no server is needed. docs/serving.md states what each program requires.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron.common.quantity import quantity

from ..errors import ConvertError

ARCHITECTURE = "LlamaForCausalLM"
NUMBERS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "vocab_size",
    "rms_norm_eps",
    "max_position_embeddings",
)
END_OF_TURN = ("<|eot_id|>", "<|eom_id|>")
Verdict = Literal["ok", "warning", "missing"]


@dataclass(frozen=True)
class ServingCheck:
    """One check of a folder: what was checked, its verdict, and what to do about it."""

    what: str
    verdict: Verdict
    text: str


def serving_checks(folder: Path) -> list[ServingCheck]:
    """All checks of a Hugging Face folder. Raises ConvertError if it has no readable config.json."""
    config = _json(folder / "config.json", needed=True)
    tokenizer_config = _json(folder / "tokenizer_config.json")
    generation = _json(folder / "generation_config.json")
    tokenizer = _json(folder / "tokenizer.json")
    special = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", []) if token.get("special")}
    template = _template(folder, tokenizer_config)
    return [
        _architecture(config),
        _numbers(config),
        _rotary(config),
        _dtype(config),
        _tokenizer(folder, tokenizer, config),
        _chat_template(template),
        _stops(config, generation, special, has_template=template is not None),
        _weights(folder),
    ]


def serving_table(checks: list[ServingCheck]) -> str:
    """The table that `inspect --serving` prints."""
    width = max(len(check.what) for check in checks)
    return "\n".join(f"{check.verdict:<8}{check.what:<{width + 2}}{check.text}" for check in checks)


def _json(path: Path, needed: bool = False) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if needed:
            raise ConvertError(
                f"{path} is missing; --serving checks a Hugging Face folder, export one with to-hf"
            ) from None
        return {}
    except ValueError as error:
        raise ConvertError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ConvertError(f"{path}: expected a JSON object")
    return content


def _template(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    inside = tokenizer_config.get("chat_template")
    if isinstance(inside, list):  # named templates
        inside = next((entry.get("template") for entry in inside if entry.get("name") == "default"), None)
    return inside if isinstance(inside, str) and inside else None


def _architecture(config: dict[str, Any]) -> ServingCheck:
    listed, kind = config.get("architectures") or [], config.get("model_type")
    if ARCHITECTURE in listed and kind == "llama":
        return ServingCheck("architecture", "ok", ARCHITECTURE)
    return ServingCheck(
        "architecture", "missing", f"architectures {listed}, model_type {kind}; write [{ARCHITECTURE!r}] and 'llama'"
    )


def _numbers(config: dict[str, Any]) -> ServingCheck:
    absent = [name for name in NUMBERS if not isinstance(config.get(name), int | float)]
    if absent:
        return ServingCheck("shape", "missing", f"config.json lacks {', '.join(absent)}")
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    sizes = [n for n in (1, 2, 4, 8, 16, 32) if heads % n == 0 and (kv % n == 0 or n % kv == 0)]
    return ServingCheck("shape", "ok", f"tensor-parallel sizes that divide the heads: {', '.join(map(str, sizes))}")


def _rotary(config: dict[str, Any]) -> ServingCheck:
    """Programs written before transformers 5 read rope_theta and rope_scaling, later ones also rope_parameters."""
    old, new = config.get("rope_theta"), config.get("rope_parameters")
    if old is None and not isinstance(new, dict):
        return ServingCheck("rotary", "missing", "neither rope_theta nor rope_parameters: servers assume 10000")
    scaling = config.get("rope_scaling") if old is not None else new
    kind = (scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default"
    if old is None:
        return ServingCheck(
            "rotary",
            "warning",
            f"only rope_parameters ({kind}), which programs written before transformers 5 do not read: they assume "
            "base 10000 without scaling. Write rope_theta and rope_scaling as well",
        )
    if isinstance(new, dict) and new.get("rope_theta", old) != old:
        return ServingCheck("rotary", "missing", f"rope_theta {old:g} and rope_parameters contradict each other")
    if (scaling or {}).get("type") and not (scaling or {}).get("rope_type"):
        return ServingCheck("rotary", "warning", "rope_scaling has type; newer programs read rope_type, write both")
    return ServingCheck("rotary", "ok", f"rope_theta {old:g}, scaling {kind}")


def _dtype(config: dict[str, Any]) -> ServingCheck:
    found = config.get("torch_dtype") or config.get("dtype")
    if found is None:
        return ServingCheck(
            "dtype", "warning", "neither torch_dtype nor dtype: servers may load fp32, at twice the memory"
        )
    return ServingCheck("dtype", "ok", str(found))


def _tokenizer(folder: Path, tokenizer: dict[str, Any], config: dict[str, Any]) -> ServingCheck:
    if not tokenizer:
        found = "tokenizer.model alone" if (folder / "tokenizer.model").is_file() else "no tokenizer"
        return ServingCheck("tokenizer", "missing", f"{found}; vLLM and SGLang read tokenizer.json")
    ids = (
        [*tokenizer.get("model", {}).get("vocab", {}).values()]
        if isinstance(tokenizer.get("model", {}).get("vocab"), dict)
        else []
    )
    highest = max([*ids, *(token["id"] for token in tokenizer.get("added_tokens", []))], default=-1)
    rows = config.get("vocab_size", 0)
    if highest >= rows:
        return ServingCheck("tokenizer", "missing", f"token {highest} has no row in a vocabulary of {rows}")
    return ServingCheck("tokenizer", "ok", f"{highest + 1} tokens for {rows} rows")


def _chat_template(template: str | None) -> ServingCheck:
    if template is not None:
        return ServingCheck("chat template", "ok", f"{len(template)} characters")
    verdict: Verdict = "warning"
    text = "none: servers reject /v1/chat/completions; right for a base model, wrong for a chat model"
    return ServingCheck("chat template", verdict, text)


def _stops(
    config: dict[str, Any], generation: dict[str, Any], special: dict[str, int], *, has_template: bool
) -> ServingCheck:
    """A chat model served with the base model's end token never stops: it has learned to end turns, not documents."""
    where = "generation_config.json" if "eos_token_id" in generation else "config.json"
    found = generation.get("eos_token_id", config.get("eos_token_id"))
    stops = set(found if isinstance(found, list) else [] if found is None else [found])
    if not stops:
        return ServingCheck("stop tokens", "missing", "no eos_token_id in generation_config.json or config.json")
    ends = {name: special[name] for name in END_OF_TURN[:1] if name in special}
    absent = [f"{name} ({index})" for name, index in ends.items() if index not in stops]
    if has_template and absent:
        return ServingCheck(
            "stop tokens",
            "missing",
            f"{where} has {sorted(stops)} without {', '.join(absent)}, which ends a turn: the model would not stop",
        )
    if where == "config.json":
        return ServingCheck("stop tokens", "warning", f"{sorted(stops)} in config.json, no generation_config.json")
    return ServingCheck("stop tokens", "ok", f"{sorted(stops)} in {where}")


def _weights(folder: Path) -> ServingCheck:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return ServingCheck("weights", "missing", "no .safetensors files")
    if len(files) > 1 and not (folder / "model.safetensors.index.json").is_file():
        return ServingCheck("weights", "missing", "several weight files without model.safetensors.index.json")
    return ServingCheck("weights", "ok", quantity(len(files), "safetensors file"))
