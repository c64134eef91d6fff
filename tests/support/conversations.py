"""Conversations in OpenAI's shape, all different."""

from __future__ import annotations

from typing import Any


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
