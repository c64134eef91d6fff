"""`inspect`: the contents of a checkpoint folder, read from headers alone."""

from __future__ import annotations

import math
from typing import Any

from megatron.layout import LlamaShape, PatchShape

from ..sources.checkpoint import Checkpoint
from ..sources.side_files import side_files


def checkpoint_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything that `inspect --json` prints."""
    shape, settings = checkpoint.shape, checkpoint.run_settings()
    travelling = side_files(checkpoint.side_folder)[0] if checkpoint.side_folder else {}
    here = set(travelling) | ({"config.json"} if checkpoint.config is not None else set())
    return {
        "folder": str(checkpoint.root),
        "kind": checkpoint.kind,
        "tensor_parallel_size": checkpoint.tp,
        "parameters": sum(math.prod(t.shape) for t in checkpoint.tensors.values()),
        "bytes": sum(t.nbytes for t in checkpoint.tensors.values()),
        "dtypes": sorted({t.dtype.name for t in checkpoint.tensors.values()}),
        "shape": vars(shape) | {"head_dim": shape.head_dim, "attention": "MHA" if shape.multi_head else "GQA"},
        "settings": None if settings is None else vars(settings),
        "side_files": sorted(here),
        "missing": _missing(checkpoint, here),
        "written_by": checkpoint.provenance.get("written_by"),
        "notes": checkpoint.notes,
        "tensors": {
            name: {
                "shape": list(t.shape),
                "dtype": t.dtype.name,
                "files": sorted({r.stored.path.name for r in t.regions}),
            }
            for name, t in checkpoint.tensors.items()
        },
    }


def _missing(checkpoint: Checkpoint, here: set[str]) -> list[str]:
    missing = []
    if checkpoint.config is None:
        missing.append("config.json (needed by to-hf: --hf-source)")
    if not here & {"tokenizer.json", "tokenizer.model"}:
        missing.append("tokenizer")
    missing += [name for name in ("generation_config.json",) if name not in here]
    return missing


def _end(shape: LlamaShape) -> tuple[str, str]:
    if isinstance(shape, PatchShape):
        learned = f", {shape.num_positions} learned positions" if shape.num_positions else ""
        return "patches", f"{shape.patch_values} values each, {shape.tokenizer}{learned}"
    return "vocabulary", f"{shape.vocab_size}, stored {shape.padded_vocab_size}, {'tied' if shape.tied else 'untied'}"


def facts_table(checkpoint: Checkpoint) -> str:
    """The table that `inspect` prints."""
    facts = checkpoint_facts(checkpoint)
    shape, settings = checkpoint.shape, facts["settings"]
    rows = [
        ("folder", facts["folder"]),
        ("kind", facts["kind"]),
        ("tensor-parallel", f"{checkpoint.tp} ranks" if checkpoint.tp > 1 else "not split"),
        ("parameters", f"{facts['parameters']:,}"),
        ("bytes", f"{facts['bytes']:,} ({', '.join(facts['dtypes'])})"),
        ("layers", f"{shape.num_layers} of width {shape.hidden_size}, MLP {shape.intermediate_size}"),
        (
            "heads",
            f"{shape.num_attention_heads} of {shape.head_dim}, {shape.num_kv_heads} key/value "
            f"({facts['shape']['attention']})",
        ),
        _end(shape),
    ]
    if settings:
        scaling = settings["rope_scaling"]
        rope = "none" if scaling is None else ", ".join(f"{k} {v:g}" for k, v in scaling.items())
        rows += [
            ("epsilon", f"{settings['rms_norm_epsilon']}"),
            ("rotary base", f"{settings['rotary_emb_base']}"),
            ("rope scaling", rope),
            ("settings from", settings["origin"]),
        ]
    rows += [("written by", facts["written_by"] or "unknown"), ("missing", "; ".join(facts["missing"]) or "nothing")]
    return "\n".join(f"{name:<16}{value}" for name, value in rows)
