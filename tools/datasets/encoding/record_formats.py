"""The formats of conversations in data sets: which fields of a record are turns, and what the others mean.

| format | fields |
|---|---|
| messages | `messages` (or `conversation`, `dialogue`, `dialog`, `turns`) with role and content, or in pairs: OpenAI |
| sharegpt | `conversations` with from and value: ShareGPT, OpenHermes 2.5 |
| alpaca | `instruction`, `input` (or `context`), `output` (or `response`), `history`: Alpaca, Dolly |
| nemotron | `input` (text or turns), `output`, `system_prompt`, `reasoning`: Llama-Nemotron |
| prompt | `prompt` and `completion` (or `response`, `output`, `answer`), texts or turns |
| question | `question` (or `query`, `problem`, `inputs`, `user`) and `answer` (or `response`, `solution`, `targets`) |
| texts | `data`: a list of texts, of the user and the assistant in turn: UltraChat |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.tokenizer.conversation import ChatError
from megatron.tokenizer.turns import REASONING, SWITCHES, looks_like

THINKING = {True: "detailed thinking on", False: "detailed thinking off"}  # Llama-Nemotron's system prompts
_LISTS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns")
_ANSWERS = ("output", "response", "completion", "answer", "solution", "target", "targets", "assistant")
_QUESTIONS = ("question", "query", "problem", "inputs", "user", "human")
_SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "sys_prompt", "systemprompt")
_PAIRS = (("human", "assistant"), ("user", "assistant"), ("question", "answer"), ("prompt", "response"))
_REFUSED = {
    "chosen": "a pair of answers is for preference training",
    "rejected": "a pair of answers is for preference training",
    "images": "this project trains on text",
    "image": "this project trains on text",
    "videos": "this project trains on text",
    "video": "this project trains on text",
    "audios": "this project trains on text",
    "audio": "this project trains on text",
    "mask": "it may mean masked or learned; give the turns a switch `train`",
    "loss_mask": "it may mean masked or learned; give the turns a switch `train`",
    "sample_weight": "conversations have no weights; put them into sources with shares",
    "loss_weight": "conversations have no weights; put them into sources with shares",
}


@dataclass
class Recognized:
    """The turns of a record as stored, and the meaning of its other fields. `unknown` lists unrecognized keys."""

    format: str
    turns: list[Any]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


class RecordFields:
    """The non-null fields of a record, under lower-case names, taken one by one; those left at the end are unknown."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.left: dict[str, Any] = {}
        for key, value in record.items():
            if value is not None:
                if key.lower() in self.left:
                    raise ChatError(f"two fields are named {key.lower()!r}; keep one", "two keys for one thing")
                self.left[key.lower()] = value
        self.all = list(record)

    def __contains__(self, key: str) -> bool:
        return key in self.left

    def take(self, *keys: str) -> Any:
        """The value of the key that is present, None if none is. ChatError if several are and their values differ."""
        found = [key for key in keys if key in self.left]
        values = [self.left.pop(key) for key in found]
        if any(value != values[0] for value in values):
            raise ChatError(
                f"{' and '.join(found)} are alternatives, but their values differ; keep one", "two keys for one thing"
            )
        return values[0] if values else None


def recognize(record: Mapping[str, Any]) -> Recognized:
    """Find the format of a record. ChatError if it has none, or has fields that cannot be respected."""
    fields = RecordFields(record)
    for key, reason in _REFUSED.items():
        if fields.take(key) not in (None, "", [], {}):
            raise ChatError(f"{key!r} changes which tokens are learned, and is not supported: {reason}", f"key {key}")
    for key in SWITCHES:
        if fields.take(key) not in (None, 1):
            raise ChatError(
                f"{key!r} of a whole record is not supported; remove the record, or set the key in its turns",
                f"key {key}",
            )
    found = _recognize(fields)
    _say_more(fields, found)
    for key, value in fields.left.items():
        # Numbers and texts next to a conversation are mostly metadata, such as used_in_training: yes.
        looks = looks_like(key, value) if isinstance(value, (bool, list, dict)) or key.startswith("sys") else None
        if looks is not None:
            raise ChatError(f"{key!r} is not known, and looks like {looks}; or take it out", f"key {key}")
    found.unknown += fields.left
    return found


def _recognize(fields: RecordFields) -> Recognized:
    if any(key in fields for key in _LISTS):
        return _list_of_turns(fields)
    if "instruction" in fields:
        return _alpaca(fields)
    if "input" in fields and "output" in fields:
        return Recognized("nemotron", [*_turns_or_text("input", fields.take("input"), "user"), *_answer(fields)])
    if "prompt" in fields:
        prompt = [*_history(fields), *_turns_or_text("prompt", fields.take("prompt"), "user")]
        if isinstance(fields.left.get("label"), bool):
            raise ChatError("'label' rates the completion: this is data for preference training", "key label")
        return Recognized("prompt", [*prompt, *_answer(fields)])
    if any(key in fields for key in _QUESTIONS):
        question = _turn("user", fields.take(*_QUESTIONS))
        return Recognized("question", [*_history(fields), question, *_answer(fields)])
    texts = fields.left.get("data")
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        fields.take("data")
        return Recognized("texts", [_turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)])
    raise ChatError(
        f"no conversation: expected messages, conversations, instruction and output, input and output, prompt and "
        f"completion, or question and answer; the fields are {', '.join(fields.all[:8]) or 'none'}",
        "no conversation",
    )


def _list_of_turns(fields: RecordFields) -> Recognized:
    name = next(key for key in _LISTS if key in fields)
    turns = _parsed(name, fields.take(*_LISTS))
    if isinstance(turns, dict) and turns and all(isinstance(column, list) for column in turns.values()):
        turns = _rows(name, turns)
    if not isinstance(turns, list):
        raise ChatError(f"field {name!r} is not a list but {type(turns).__name__}", "not a list")
    turns = [turn for item in turns for turn in _pair(item)]
    share_gpt = bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]
    return Recognized("sharegpt" if share_gpt else "messages", turns)


def _rows(name: str, columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Turns that are stored as one list per field."""
    if len({len(column) for column in columns.values()}) != 1:
        raise ChatError(f"the lists in {name!r} differ in length", "lists of several lengths")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _pair(item: Any) -> list[Any]:
    """The two turns of an item with a question and its answer; other items unchanged."""
    if isinstance(item, dict):
        for asks, answers in _PAIRS:
            if {asks, answers} == {key for key, value in item.items() if value is not None}:
                return [_turn("user", item[asks]), _turn("assistant", item[answers])]
    return [item]


def _alpaca(fields: RecordFields) -> Recognized:
    asked = [fields.take("instruction"), fields.take("input", "context")]
    if not all(isinstance(text, str) for text in asked if text is not None):
        raise ChatError("'instruction' or 'input' is not text", "content is not text")
    question = "\n".join(text for text in asked if text and text.strip())
    return Recognized("alpaca", [*_history(fields), _turn("user", question), *_answer(fields)])


def _history(fields: RecordFields) -> list[Any]:
    """Turns that precede the question: pairs of texts, or turns."""
    history = _parsed("history", fields.take("history"))
    if history in (None, ""):
        return []
    if not isinstance(history, list):
        raise ChatError("'history' is not a list of pairs of texts", "history")
    turns: list[Any] = []
    for pair in history:
        if isinstance(pair, dict):
            turns.append(pair)
        elif isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair):
            turns += [_turn("user", pair[0]), _turn("assistant", pair[1])]
        else:
            raise ChatError("'history' is not a list of pairs of texts", "history")
    return turns


def _answer(fields: RecordFields) -> list[Any]:
    """The last turn or turns, with the reasoning from a separate field."""
    if not any(key in fields for key in _ANSWERS):
        raise ChatError(
            f"no answer: expected one of {', '.join(_ANSWERS)}; the fields are {', '.join(fields.all[:8])}", "no answer"
        )
    turns = _turns_or_text("the answer", fields.take(*_ANSWERS), "assistant")
    thoughts = {
        key: fields.take(key)
        for key in REASONING
        if isinstance(fields.left.get(key), str) and fields.left[key] not in ("on", "off")
    }
    if thoughts:
        if not isinstance(turns[-1], dict):
            raise ChatError("reasoning in a separate field, but the answer is not a single turn", "reasoning")
        turns[-1] = {**turns[-1], **thoughts}
    return turns


def _say_more(fields: RecordFields, found: Recognized) -> None:
    """System prompt, tools, documents and arguments of the template: fields that may accompany any format."""
    system = fields.take(*_SYSTEM)
    reasoning = fields.left.get("reasoning")
    if reasoning in ("on", "off", True, False):
        fields.take("reasoning")
        system = system or THINKING[reasoning in ("on", True)]
    elif any(fields.left.get(key) for key in REASONING):
        raise ChatError("reasoning in a separate field next to a list of turns: its turn is ambiguous", "reasoning")
    if system is not None and not isinstance(system, str):
        raise ChatError(f"the system prompt is not text but {type(system).__name__}", "content is not text")
    if system:
        _put_system(found.turns, system, asked=reasoning not in ("on", "off", True, False))
    tools = _parsed("tools", fields.take("tools"))
    functions = _parsed("functions", fields.take("functions"))
    if functions:
        if tools:
            raise ChatError("tools and functions; keep one", "two keys for one thing")
        tools = [{"type": "function", "function": function} for function in _objects("functions", functions)]
    if tools not in (None, ""):
        found.tools = _objects("tools", tools)
    documents = _parsed("documents", fields.take("documents"))
    if documents not in (None, ""):
        found.documents = _objects("documents", documents)
    arguments = _parsed("chat_template_kwargs", fields.take("chat_template_kwargs"))
    if arguments:
        if not isinstance(arguments, dict):
            raise ChatError("'chat_template_kwargs' is not an object", "not an object")
        found.template_arguments = arguments


def _put_system(turns: list[Any], system: str, asked: bool) -> None:
    """Put the system prompt first, unless the turns begin with one: then both must be equal."""
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    if first.get("role", first.get("from")) in ("system", "developer"):
        if asked and first.get("content", first.get("value")) != system:
            raise ChatError("the record's system prompt differs from that of the first turn", "two system prompts")
    else:
        turns.insert(0, _turn("system", system))


def _objects(name: str, value: Any) -> list[dict[str, Any]]:
    items = [_parsed(name, item) for item in (value if isinstance(value, list) else [value])]
    if not all(isinstance(item, dict) for item in items):
        raise ChatError(f"field {name!r} is not a list of objects", "not an object")
    return items


def _turns_or_text(name: str, value: Any, role: str) -> list[Any]:
    if isinstance(value, str):
        return [_turn(role, value)]
    if isinstance(value, list):
        return list(value)
    raise ChatError(f"{name} is neither text nor a list of turns but {type(value).__name__}", "content is not text")


def _turn(role: str, text: Any) -> dict[str, Any]:
    return {"role": role, "content": text}


def _parsed(name: str, value: Any) -> Any:
    """Parse a list stored as JSON text, as in tabular data sets."""
    if not isinstance(value, str) or not value.strip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ChatError(f"field {name!r} is text that is not JSON ({error})", "not JSON") from None
