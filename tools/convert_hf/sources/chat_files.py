"""The chat format of a fine-tuned model, carried from its training data to the files of a Hugging Face folder.

The manifest of a training checkpoint records, for every source of conversations, the template that formatted them and
the tokens that end a turn. The files of a base model end generation at the end of a document, and have no template or a
different one: with them, a fine-tuned model would not stop generating.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConvertError

_GENERATION, _TOKENIZER, _MAP, _TEMPLATE = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class TrainedChat:
    """`template` is Jinja text, None if the data used several by name; `end_of_turn` maps token names to ids."""

    template: str | None
    end_of_turn: Mapping[str, int]


def trained_chat(provenance: Mapping[str, Any]) -> TrainedChat | None:
    """The chat format a checkpoint was fine-tuned on; None without conversations. ConvertError if sources differ."""
    data = provenance.get("data")
    found: dict[str, TrainedChat] = {}
    if isinstance(data, Mapping):
        trained = _trained_on(provenance)
        for prefix, entry in data.items():
            chat = entry.get("chat") if isinstance(entry, Mapping) else None
            if isinstance(chat, Mapping) and (trained is None or Path(prefix).name in trained):
                found[prefix] = TrainedChat(chat.get("template"), dict(chat.get("end_of_turn") or {}))
    if not found:
        earlier = provenance.get("source_provenance")
        return trained_chat(earlier) if isinstance(earlier, Mapping) else None
    first = next(iter(found.values()))
    if any(chat != first for chat in found.values()):
        raise ConvertError(
            f"the checkpoint was trained on conversations with different chat templates: {', '.join(found)}; "
            f"preprocess them with one template, or export with --base-chat to keep the files of the base model"
        )
    return first


def _trained_on(provenance: Mapping[str, Any]) -> set[str] | None:
    """Last parts of the training sources' paths, None if no configuration is recorded. A converted checkpoint has its
    training configuration in the provenance of its source."""
    config, earlier = provenance.get("config"), provenance.get("source_provenance")
    paths = config.get("train_data_paths") if isinstance(config, Mapping) else None
    if not isinstance(paths, list):
        return _trained_on(earlier) if isinstance(earlier, Mapping) else None
    return {Path(str(path.get("path") if isinstance(path, Mapping) else path)).name for path in paths}


def put_chat(
    files: dict[str, bytes | Path], config: dict[str, Any], chat: TrainedChat, vocab_size: int
) -> tuple[dict[str, Any], list[str]]:
    """Put the chat format into `files`. Returns config.json with the end tokens, and notes on the changes."""
    outside = {name: index for name, index in chat.end_of_turn.items() if not 0 <= index < vocab_size}
    if outside:
        raise ConvertError(f"the end tokens {outside} of the conversations are outside the vocabulary of {vocab_size}")
    notes = []
    # The ids that end generation.
    generation = _read(files, _GENERATION)
    ends = _ids(generation.get("eos_token_id", config.get("eos_token_id")))
    new = [index for index in chat.end_of_turn.values() if index not in ends]
    if new or _GENERATION not in files:
        ends = [*ends, *new]
        files[_GENERATION] = _json({**generation, "eos_token_id": ends})
        config = {**config, "eos_token_id": ends}
        notes.append(f"generation also ends at {', '.join(chat.end_of_turn)} (eos_token_id {ends})")
    # The tokenizer's own end token.
    if chat.end_of_turn:
        end = next(iter(chat.end_of_turn))
        for name in (_TOKENIZER, _MAP):
            if name in files:
                content = _read(files, name)
                old = content.get("eos_token")
                if (old.get("content") if isinstance(old, dict) else old) != end:
                    content["eos_token"] = {**old, "content": end} if isinstance(old, dict) else end
                    files[name] = _json(content)
                    notes.append(f"{name}: eos_token is {end}")
    # The template, which must be the only one in the folder.
    if chat.template is None:
        notes.append("the conversations used several named chat templates; the files of the base model are kept")
        return config, notes
    if _TOKENIZER in files:
        content = _read(files, _TOKENIZER)
        if content.pop("chat_template", None) is not None:
            files[_TOKENIZER] = _json(content)
    for name in [name for name in files if name.startswith("additional_chat_templates/")]:
        del files[name]
    files[_TEMPLATE] = chat.template.encode()
    notes.append(f"{_TEMPLATE} is the template of the training conversations")
    return config, notes


def _ids(value: Any) -> list[int]:
    return list(value) if isinstance(value, list) else [] if value is None else [value]


def _read(files: Mapping[str, bytes | Path], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    given = files[name]
    try:
        content = json.loads(given if isinstance(given, bytes) else given.read_bytes())
    except ValueError as error:
        raise ConvertError(f"{name} of the source is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConvertError(f"{name} of the source is not a JSON object")
    return content


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
