"""The JSON schema for editors and the Markdown table of the documentation, both generated from the keys.

python -m megatron.neox_arguments.schema > configs/schema.json
python -m megatron.neox_arguments.schema --update docs/configuration.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron.neox_arguments.arguments import NeoXArgs
from megatron.neox_arguments.keys.all_keys import AllKeys
from megatron.neox_arguments.keys.fields import nested_mapping
from megatron.neox_arguments.unsupported import UNSUPPORTED, WITHOUT_EFFECT

BEGIN, END = "<!-- generated keys: begin -->", "<!-- generated keys: end -->"

# Titles of the groups of keys, in the order in which NeoXArgs lists them.
_TITLES = {
    "ModelKeys": "Model",
    "ModalityKeys": "Images",
    "ParallelKeys": "Ranks",
    "EngineKeys": "Engine",
    "PrecisionKeys": "Precision",
    "OptimizationKeys": "Optimization",
    "DataKeys": "Data",
    "CheckpointKeys": "Checkpoints",
    "LoraKeys": "Adapters",
    "RuntimeKeys": "Running, logging, evaluation, generation",
    "GenerationKeys": "Generation",
    "EvaluationKeys": "Evaluating a checkpoint",
    "EmbeddingKeys": "Embeddings",
    "SurvivalKeys": "Survival",
}


def groups() -> list[tuple[str, type[BaseModel]]]:
    """Title and class of every group of keys, each followed by the mappings nested in it."""
    found: list[tuple[str, type[BaseModel]]] = []
    for group in reversed(AllKeys.__bases__):
        found += [(_TITLES[group.__name__], group), *_nested(group, "")]
    return found


def _nested(group: type[BaseModel], prefix: str) -> list[tuple[str, type[BaseModel]]]:
    found: list[tuple[str, type[BaseModel]]] = []
    for name, field in group.model_fields.items():
        inner = nested_mapping(field.annotation)
        if inner is not None:
            entry = ", each entry" if "list[" in str(field.annotation) else ""
            found += [(f"{prefix}{name}{entry}", inner), *_nested(inner, f"{prefix}{name}.")]
    return found


def json_schema() -> dict[str, Any]:
    """Schema of one file. Nothing is required: a file holds some of the keys, and deepy.py checks the merged result."""
    schema = NeoXArgs.model_json_schema()
    schema.pop("required")
    schema |= {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "NeoX-Llama configuration",
        "description": "One of the files that are merged on the command line of deepy.py.",
    }
    for node in (schema, *schema["$defs"].values()):
        for entry in node["properties"].values():
            _tidy(entry)
        if node is not schema:
            node.pop("title", None)
    for name, reason in WITHOUT_EFFECT.items():
        schema["properties"][name] = {"description": f"No effect: {reason}.", "deprecated": True}
    for name, refusal in UNSUPPORTED.items():
        schema["properties"][name] = {
            "description": f"Not supported. {refusal.reason}",
            "enum": list(refusal.neutral),
            "deprecated": True,
        }
    return schema


def _tidy(entry: dict[str, Any]) -> None:
    entry.pop("title", None)
    for mark in ("x-ours", "x-required"):
        entry.pop(mark, None)
    rule = entry.pop("x-derived", None)
    if rule:
        entry.pop("default", None)
        entry["description"] += f" Default: {rule}."


def key_table() -> str:
    """All keys as Markdown: name, type, default, meaning; keys that GPT-NeoX does not have carry a `+`."""
    parts = []
    for title, group in groups():
        parts.append(f"### {title}\n\n| key | type | default | meaning |\n|---|---|---|---|")
        for name, field in group.model_fields.items():
            extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            mark = " +" if extra.get("x-ours") else ""
            cells = [f"`{name}`{mark}", _type(field.annotation), _default(field, extra), field.description or ""]
            parts[-1] += "\n| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    parts.append("### Keys of GPT-NeoX that are refused\n\nThe neutral values are accepted.\n")
    reasons: dict[str, list[str]] = {}
    for name, refusal in UNSUPPORTED.items():
        reasons.setdefault(refusal.reason, []).append(f"`{name}`")
    parts[-1] += "\n".join(f"- {', '.join(names)}: {reason}" for reason, names in reasons.items())
    parts.append("### Keys of GPT-NeoX without effect\n\nThey are accepted with a note.\n")
    effects: dict[str, list[str]] = {}
    for name, reason in WITHOUT_EFFECT.items():
        effects.setdefault(reason, []).append(f"`{name}`")
    parts[-1] += "\n".join(f"- {', '.join(names)}: {reason}." for reason, names in effects.items())
    return "\n\n".join(parts)


def _type(annotation: Any) -> str:
    """An annotation as a reader of YAML needs it: choices by value, no constraints, nested models as mappings."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " | ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in arguments)
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(_type(one) for one in arguments if one is not NoneType))
    if origin is list:
        return f"list[{_type(arguments[0])}]"
    if isinstance(annotation, type) and not issubclass(annotation, BaseModel) and annotation is not dict:
        return annotation.__name__
    return "mapping"


def _default(field: FieldInfo, extra: dict[str, Any]) -> str:
    if extra.get("x-required"):
        return "**required**"
    if "x-derived" in extra:
        return str(extra["x-derived"])
    if isinstance(field.default, BaseModel):
        return "see below"
    if field.default is None:
        return "none"
    return f"`{json.dumps(field.default)}`"


def updated(text: str) -> str:
    """A document with the table between its two markers updated."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{key_table()}\n{END}{after}"


def main(arguments: list[str]) -> int:
    if not arguments:
        print(json.dumps(json_schema(), indent=1))
        return 0
    if len(arguments) == 2 and arguments[0] == "--update":
        path = Path(arguments[1])
        path.write_text(updated(path.read_text()))
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
