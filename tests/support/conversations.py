"""Conversations in OpenAI's format: plain ones, all different, and random ones that use every field."""

from __future__ import annotations

import json
import random
from typing import Any

WORDS = [
    *(
        "Où est l'étoile?",
        "M31 は銀河です",
        "z ≈ 0.5 ± 10⁻⁵",
        "  spaces around  ",
        "\n\nnew\n\nlines\n",
        "👩‍🚀 🚀",
        "a",
    ),
    *(
        'quotes "and" \\ back',
        "<b>HTML</b> & 'apos'",
        "<|eot_id|> quoted",
        "private",
        "class",
        "append",
        "deep",
        "{{ x }}",
    ),
    *("tab\there", "<think>\nhm\n</think>\n\nso", "the answer is 42", "ünïcödé", "line\u2028separator", "x" * 300),
]
NAMES = ["simbad", "get_weather", "ŝerĉi", "brave_search"]


def conversations(count: int, topic: str) -> list[dict[str, Any]]:
    """`count` records of two questions with two answers each."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Question {i} about {topic}?"},
                {"role": "assistant", "content": f"Answer {i}. " * (1 + i % 7)},
                {"role": "user", "content": "More?"},
                {"role": "assistant", "content": f"More {i}."},
            ]
        }
        for i in range(count)
    ]


def random_records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` records with `messages` and sometimes `tools`, `documents`, `chat_template_kwargs`, with tool calls and
    results, reasoning under each of its names, non-ASCII letters, empty and null fields, contents in parts."""
    chance = random.Random(seed)
    return [_record(chance) for _ in range(count)]


def _record(chance: random.Random) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    if chance.random() < 0.4:
        messages.append({"role": chance.choice(["system", "system", "developer"]), "content": _text(chance)})
    for _ in range(chance.randint(1, 4)):
        messages.append({"role": "user", "content": _content(chance)})
        if chance.random() < 0.1:
            messages[-1]["name"] = chance.choice(["Ada", None])
        if chance.random() < 0.35:
            messages += _call(chance)
        messages.append(_answer(chance))
    record: dict[str, Any] = {"messages": messages}
    if chance.random() < 0.4:
        record["tools"] = [_tool(chance) for _ in range(chance.randint(0, 2))]
    if chance.random() < 0.2:
        record["documents"] = [{"title": chance.choice(["T", ""]), "text": _text(chance)} for _ in range(2)]
    if chance.random() < 0.2:
        record["chat_template_kwargs"] = chance.choice([{"enable_thinking": False}, {"calendar": "Λ"}])
    return record


def _text(chance: random.Random) -> str:
    return " ".join(chance.choices(WORDS, k=chance.randint(1, 3)))


def _content(chance: random.Random) -> Any:
    kind = chance.random()
    if kind < 0.05:
        return [{"type": "text", "text": _text(chance)} for _ in range(chance.randint(1, 2))]
    return "" if kind < 0.08 else None if kind < 0.1 else _text(chance)


def _answer(chance: random.Random) -> dict[str, Any]:
    answer: dict[str, Any] = {"role": "assistant", "content": _content(chance)}
    if chance.random() < 0.2:
        answer[chance.choice(["reasoning_content", "thinking", "reasoning"])] = chance.choice([_text(chance), None, ""])
    if chance.random() < 0.1:
        answer["tool_calls"] = chance.choice([None, []])
    return answer


def _call(chance: random.Random) -> list[dict[str, Any]]:
    calls, results = [], []
    for number in range(chance.choice([1, 1, 1, 2])):
        arguments = {"object": _text(chance), "größe": chance.choice([1, 2.5, None, True, [1, "é"], {"a": {"b": "ç"}}])}
        calls.append(
            {
                "id": f"call_{number}",
                "type": "function",
                "function": {
                    "name": chance.choice(NAMES),
                    "arguments": arguments if chance.random() < 0.8 else json.dumps(arguments),
                },
            }
        )
        results.append({"role": "tool", "tool_call_id": f"call_{number}", "content": _text(chance)})
    return [{"role": "assistant", "content": chance.choice([None, "", _text(chance)]), "tool_calls": calls}, *results]


def _tool(chance: random.Random) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"object": {"type": "string", "description": _text(chance)}}}
    return {
        "type": "function",
        "function": {"name": chance.choice(NAMES), "description": _text(chance), "parameters": parameters},
    }
