"""What a checkpoint records of its model and its run, and where a configuration differs. Without torch.

Facts of the model are its sizes and what no tensor shows (epsilon, rotary base and scaling): another value means
another model, and the run stops before it costs anything. Facts of the run (batch, rate, data, tokenizer, ...) may
change on purpose; changes are listed once, in one block, so that none goes unnoticed.

Training records both in the manifest (`provenance.facts`). A converted checkpoint has those of its `hf/config.json`; a
training checkpoint of an older version has the keys that its run was given.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.common.errors import CheckpointError

if TYPE_CHECKING:
    from megatron.checkpoint.state import Base
    from megatron.neox_arguments import NeoXArgs

_SIZES = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_kv_heads",
    "intermediate_size",
    "vocab_size",
    "no_weight_tying",
)
MODEL_KEYS = (*_SIZES, "rms_norm_epsilon", "rotary_emb_base", "rope_scaling")
_OF_TEXT = ("vocab_size", "no_weight_tying")
_OF_IMAGES = ("modality", "patches")
RUN_KEYS = (
    "seq_length",
    "train_batch_size",
    "optimizer",
    "weight_decay",
    "gradient_clipping",
    "lr_decay_style",
    "lr_decay_iters",
    "warmup",
    "lr_warmup_iters",
    "lr_wsd_decay_iters",
    "lr_wsd_decay_fraction",
    "lr_wsd_decay_style",
    "lr_restart_iter",
    "min_lr",
    "lr_overrides",
    "train_iters",
    "train_epochs",
    "precision",
    "seed",
    "train_data_paths",
    "train_data_weights",
    "train_label_data_paths",
    "data_path",
    "split",
    "pack_impl",
    "allow_chopped",
    "eod_mask_loss",
    "isolate_documents",
    "skip_sample_ranges",
    "tokenizer_type",
    "max_position_embeddings",
)
TOKENIZER = "tokenizer"  # CRC-32 of the file `vocab_file`
_CONFIG_JSON = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "rms_norm_epsilon": "rms_norm_eps",
}
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def facts_of(args: NeoXArgs) -> dict[str, dict[str, Any]]:
    """The facts of a configuration as plain JSON values: {"model": {...}, "run": {...}}."""
    dumped = json.loads(args.model_dump_json(include={*MODEL_KEYS, *_OF_IMAGES, *RUN_KEYS}))
    model = {name: dumped[name] for name in MODEL_KEYS}
    model["rope_scaling"] = _scaling(model["rope_scaling"])
    if args.reads_images:
        model = {name: value for name, value in model.items() if name not in _OF_TEXT}
        model |= {name: dumped[name] for name in _OF_IMAGES}
    run = _flat({name: dumped[name] for name in RUN_KEYS})
    run[TOKENIZER] = _file_mark(args.vocab_file)
    return {"model": model, "run": run}


def adapter_facts(args: NeoXArgs, base: Base | None) -> dict[str, Any]:
    """What an adapter's checkpoint adds to the provenance: its settings and its base. Empty without an adapter."""
    if args.lora is None or base is None:
        return {}
    return {"base": asdict(base), "lora": _lora(args)}


def _lora(args: NeoXArgs) -> dict[str, Any]:
    assert args.lora is not None
    lora = args.lora
    return {"rank": lora.rank, "alpha": lora.alpha, "targets": [*lora.projections], "rslora": lora.rslora}


def check_kind(folder: Path, provenance: Mapping[str, Any], args: NeoXArgs, *, is_base: bool) -> None:
    """Raise CheckpointError if a checkpoint holds an adapter where a model is wanted, or vice versa.

    With `lora`, the base is a model, and a run's own checkpoints hold the adapter that the configuration describes.
    """
    base = provenance.get("base")
    if args.lora is None or is_base:
        if base is None:
            return
        raise CheckpointError(
            f"{folder} holds an adapter and no model: give its base, load: {Path(base['folder']).parent}, and lora: "
            f"{{load: {folder}}}, or merge the two with `python tools/convert_hf to-hf --adapter {folder}`"
        )
    if base is None:
        raise CheckpointError(
            f"{folder} holds a whole model: its run trains all weights. With lora, save gets checkpoints of the "
            f"adapter alone; give another save folder"
        )
    changed = differences(provenance.get("lora", {}), _lora(args))
    if changed:
        shown = "; ".join(f"lora.{name}: {_shown(old)} in it, {_shown(new)} here" for name, old, new in changed)
        raise CheckpointError(
            f"{folder} holds a different adapter from the one in the configuration: {shown}. Correct the "
            f"configuration, or give another save folder"
        )


def _flat(keys: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names: `optimizer.params.lr`."""
    found: dict[str, Any] = {}
    for name, value in keys.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {above + name: value}
    return found


def _file_mark(path: str | None) -> str | None:
    """Checksum that identifies a tokenizer file; None if it cannot be read."""
    if path is None:
        return None
    try:
        return f"crc32:{zlib.crc32(Path(path).read_bytes()):08x}"
    except OSError:
        return None


def recorded_facts(provenance: Mapping[str, Any], config_json: bytes | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(facts of the model, facts of the run) that a checkpoint records; what it does not record is left out.

    What training recorded takes precedence over the `config.json` that travels along, which training never changes.
    """
    facts = provenance.get("facts")
    if isinstance(facts, Mapping) and isinstance(facts.get("model"), Mapping) and isinstance(facts.get("run"), Mapping):
        return dict(facts["model"]), dict(facts["run"])
    given = provenance.get("config")
    given = given if isinstance(given, Mapping) else {}
    model = _model_of_config_json(config_json)
    model |= {name: given[name] for name in MODEL_KEYS if name in given and name != "intermediate_size"}
    if "rope_scaling" in given:
        model["rope_scaling"] = _scaling(given["rope_scaling"])
    return model, _flat({name: given[name] for name in RUN_KEYS if name in given})


def _model_of_config_json(content: bytes | None) -> dict[str, Any]:
    """The facts that a Hugging Face config states in either spelling of its rotary settings."""
    try:
        raw = json.loads(content or b"{}")
    except ValueError:
        return {}  # a damaged one is found by its checksum
    if not isinstance(raw, dict):
        return {}
    model = {ours: raw[theirs] for ours, theirs in _CONFIG_JSON.items() if raw.get(theirs) is not None}
    if isinstance(raw.get("patches"), dict):  # what tools/convert_hf writes for a model of images
        model |= {"modality": "patches", "patches": raw["patches"]}
    if isinstance(raw.get("tie_word_embeddings"), bool):
        model["no_weight_tying"] = not raw["tie_word_embeddings"]
    rope = raw.get("rope_parameters")
    rope = rope if isinstance(rope, dict) else raw
    if rope.get("rope_theta") is not None:
        model["rotary_emb_base"] = rope["rope_theta"]
        model["rope_scaling"] = _scaling(rope if rope is not raw else raw.get("rope_scaling"))
    return model


def _scaling(value: Any) -> dict[str, float] | None:
    """The numbers of a rotary scaling in either spelling; None if there is none."""
    if not isinstance(value, Mapping) or value.get("rope_type", value.get("type")) in (None, "default"):
        return None
    return {name: value[name] for name in _SCALING if value.get(name) is not None}


def differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, recorded value, present value) of each key in both whose values differ; 500000 and 500000.0 are equal."""
    return [(name, recorded[name], now[name]) for name in now if name in recorded and recorded[name] != now[name]]


def check_model(folder: Path, recorded: Mapping[str, Any], args: NeoXArgs) -> None:
    """Raise CheckpointError, with all differences, unless the configuration describes the checkpoint's model."""
    allowed = set(args.allow_model_changes)
    before, now = ({"modality": "text", **model} for model in (recorded, facts_of(args)["model"]))
    changed = [entry for entry in differences(before, now) if entry[0] not in allowed]
    if not changed:
        return
    lines = [
        f"  {name}: {_shown(old)} in the checkpoint, {_shown(new)} in the configuration" for name, old, new in changed
    ]
    names = ", ".join(name for name, _, _ in changed)
    raise CheckpointError(
        f"{folder} holds a different model from the one in the configuration:\n" + "\n".join(lines) + "\n"
        f"correct the configuration; if the change is meant (a longer context, for instance), "
        f"--allow_model_changes [{names}] trains the weights with the new value"
    )


def describe_run_changes(recorded: Mapping[str, Any], args: NeoXArgs) -> str | None:
    """A block that lists what a continued run does differently from the run that saved; None if nothing."""
    changed = differences(recorded, facts_of(args)["run"])
    if not changed:
        return None
    width = max(len(name) for name, _, _ in changed)
    lines = [f"  {name.ljust(width)}  {_shown(old)} -> {_shown(new)}" for name, old, new in changed]
    return "changed since the checkpoint was saved:\n" + "\n".join(lines)


def data_changes(saved: Any, now: Mapping[str, Any]) -> list[str]:
    """Lines about data that differs from what the saved run read; `saved` and `now` are fingerprints by source.

    Empty for a checkpoint that records no data (a converted one).
    """
    if not isinstance(saved, Mapping) or not saved:
        return []
    lines = []
    gone = [saved[name] for name in saved if name not in now]
    new = [now[name] for name in now if name not in saved]
    changed = sorted(
        [name for name in saved.keys() & now.keys() if not _same_content(saved[name], now[name])]
        + [name for name in now if name not in saved and not any(_moved(old, now[name]) for old in gone)]
        + [name for name in saved if name not in now and not any(_moved(saved[name], other) for other in new)]
    )
    if changed:
        lines.append(f"data differs from what this run was trained on so far: {', '.join(changed)}")
    both = sorted(saved.keys() & now.keys())
    written = [name for name in both if name not in changed and _written(saved[name]) != _written(now[name])]
    if written:
        lines.append(
            f"data was rewritten since the checkpoint was saved, its samples are unchanged: {', '.join(written)}"
        )
    return lines


def _same_content(saved: Any, now: Any) -> bool:
    if not isinstance(saved, Mapping) or not isinstance(now, Mapping):
        return bool(saved == now)
    known = (saved.keys() & now.keys()) - {"path", "written"}
    return all(saved[key] == now[key] for key in known)


def _moved(saved: Any, now: Any) -> bool:
    """Whether the same data now has another name."""
    return isinstance(saved, Mapping) and isinstance(now, Mapping) and _same_content(saved, now)


def _written(fingerprint: Any) -> Any:
    return fingerprint.get("written") if isinstance(fingerprint, Mapping) else None


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
