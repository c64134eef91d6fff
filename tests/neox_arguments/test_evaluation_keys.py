"""Rules of the evaluation keys: each rejects its case, which passes without the rule."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megatron.neox_arguments import ConfigError, NeoXArgs
from megatron.neox_arguments.keys import evaluation
from megatron.neox_arguments.keys.all_keys import REGISTRY
from megatron.neox_arguments.registry import Task
from tests.support.configurations import keys

pytestmark = pytest.mark.unit

BASE = {"from_scratch": None, "load": "runs/a", "vocab_file": "tokenizer.json"}
ASKED = {"items": "q.jsonl"}

BROKEN: list[tuple[str, Task, dict[str, Any], str]] = [
    ("tasks_have_lm_eval", "eval", {"eval_tasks": ["arc_easy"]}, "pip install .[eval]"),
    (
        "texts_have_a_tokenizer",
        "eval",
        {"eval_documents": ["a.jsonl"], "vocab_file": None},
        "eval_documents needs vocab",
    ),
    ("texts_have_a_tokenizer", "mcq", {"mcq": ASKED, "vocab_file": None}, "mcq.items needs vocab_file"),
    ("questions_are_given", "mcq", {}, "mcq.items is missing"),
    ("conversations_have_no_shots", "mcq", {"mcq": {**ASKED, "prefill": "x"}}, "mcq.prefill begins the answer"),
    (
        "conversations_have_no_shots",
        "mcq",
        {"chat": True, "mcq": {**ASKED, "shots": 2, "shots_file": "s.jsonl"}},
        "mcq.shots are examples in a plain prompt",
    ),
    (
        "thinking_is_generated",
        "mcq",
        {"chat": True, "thinking": True, "mcq": ASKED},
        "mcq.method: letter does not produce; use generate",
    ),
    (
        "thinking_prefills_itself",
        "mcq",
        {"chat": True, "thinking": True, "mcq": {**ASKED, "method": "generate", "prefill": "x"}},
        "leave mcq.prefill out",
    ),
    ("shots_have_a_file", "mcq", {"mcq": {**ASKED, "shots": 2}}, "mcq.shots is given without mcq.shots_file"),
    ("shots_have_a_file", "mcq", {"mcq": {**ASKED, "shots_file": "s"}}, "mcq.shots_file is given without mcq.shots"),
]


@pytest.mark.parametrize(("rule", "task", "changes", "message"), BROKEN)
def test_a_broken_rule_is_reported(
    rule: str, task: Task, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)  # as if lm-eval were missing
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        NeoXArgs.from_dict(keys(**BASE | changes), task=task)
    assert "things are wrong" not in str(caught.value)
    monkeypatch.setattr(REGISTRY, "rules", [entry for entry in REGISTRY.rules if entry.name != rule])
    NeoXArgs.from_dict(keys(**BASE | changes), task=task)


@pytest.mark.parametrize("changes", [{"thinking": False}, {"system_prompt": "x"}, {"max_thinking_tokens": 9}])
def test_a_question_without_a_conversation_has_none_of_its_keys(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="without chat: these keys apply only to conversations"):
        NeoXArgs.from_dict(keys(**BASE | changes | {"mcq": ASKED}), task="mcq")


def test_every_rule_has_a_case() -> None:
    assert {entry.name for entry in evaluation.registry.rules} == {rule for rule, *_ in BROKEN}


def test_a_test_needs_no_training_keys() -> None:
    changes = {"optimizer": None, "train_iters": None, "train_data_paths": None, "seq_length": None, "mcq": ASKED}
    args = NeoXArgs.from_dict(keys(**BASE | changes), task="mcq")
    assert args.mcq.items == "q.jsonl"
    assert args.seq_length == args.max_position_embeddings
    assert NeoXArgs.from_json(args.to_json()) == args


def test_paths_of_a_test_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch")
    changes = {
        "mcq": {"items": "$SCRATCH/q.jsonl", "instruction": "5$ or $HOME?"},
        "eval_documents": ["$SCRATCH/a.jsonl"],
    }
    args = NeoXArgs.from_dict(keys(**BASE | changes), task="mcq")
    assert (args.mcq.items, args.mcq.instruction) == ("/scratch/q.jsonl", "5$ or $HOME?")
    assert args.eval_documents == ["/scratch/a.jsonl"]
