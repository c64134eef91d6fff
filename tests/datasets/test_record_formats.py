"""preprocess_sft.py reads conversations in every common format, and reports what it does not support."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron.common.labels import IGNORE_INDEX
from megatron.data.indexed import IndexedFile
from megatron.tokenizer import Tokenizer
from tests.support.data_commands import preprocess_chats, table_rows
from tests.support.text_files import write_records

pytestmark = pytest.mark.unit

Turn = tuple[str, str, bool]  # role, words, whether they are learned
ASKED: list[Turn] = [("user", "Name a galaxy.", False), ("assistant", "M31", True)]
SYSTEM: Turn = ("system", "Be brief.", False)
CALL = {"name": "simbad", "arguments": {"object": "Ångström"}}
CALL_TEXT = '{"type": "function", "name": "simbad", "parameters": {"object": "Ångström"}}'
CALLED: list[Turn] = [
    ("user", "Where?", False),
    ("assistant", CALL_TEXT, True),
    ("ipython", "10.68", False),
    ("assistant", "There.", True),
]
TWO = [("user", "Hi", False), ("assistant", "Ho", False), *ASKED]


def turns(*words: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(words)]


def share_gpt(*words: str) -> list[dict[str, Any]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(words)]


def switched(key: str, off: Any, on: Any) -> list[dict[str, Any]]:
    messages = turns("Hi", "Ho", "Name a galaxy.", "M31")
    messages[1][key], messages[3][key] = off, on
    return messages


def called(**call: Any) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": None, **call},
        {"role": "tool", "content": "10.68"},
        {"role": "assistant", "content": "There."},
    ]


QUESTION, ANSWER = "Name a galaxy.", "M31"
UNDERSTOOD: dict[str, tuple[dict[str, Any], list[Turn], str]] = {
    "alpaca": ({"instruction": QUESTION, "input": "", "output": ANSWER}, ASKED, "alpaca"),
    "alpaca with input": (
        {"instruction": "Name it.", "input": "a galaxy", "output": ANSWER},
        [("user", "Name it.\na galaxy", False), ASKED[1]],
        "alpaca",
    ),
    "alpaca with history and system": (
        {"instruction": QUESTION, "output": ANSWER, "history": [["Hi", "Ho"]], "system": "Be brief."},
        [SYSTEM, ("user", "Hi", False), ("assistant", "Ho", True), *ASKED],
        "alpaca",
    ),
    "dolly": (
        {"instruction": "Name it.", "context": "a galaxy", "response": ANSWER, "category": "qa"},
        [("user", "Name it.\na galaxy", False), ASKED[1]],
        "alpaca",
    ),
    "sharegpt": ({"conversations": share_gpt(QUESTION, ANSWER)}, ASKED, "sharegpt"),
    "sharegpt and system": (
        {"conversations": share_gpt(QUESTION, ANSWER), "system": "Be brief."},
        [SYSTEM, *ASKED],
        "sharegpt",
    ),
    "openhermes": (
        {
            "conversations": [{"from": "system", "value": "Be brief."}, *share_gpt(QUESTION, ANSWER)],
            "source": "x",
            "system_prompt": None,
            "hash": 1,
        },
        [SYSTEM, *ASKED],
        "sharegpt",
    ),
    "sharegpt in json text": ({"conversations": json.dumps(share_gpt(QUESTION, ANSWER))}, ASKED, "sharegpt"),
    "openai": ({"messages": turns(QUESTION, ANSWER)}, ASKED, "messages"),
    "openai developer": (
        {"messages": [{"role": "developer", "content": "Be brief."}, *turns(QUESTION, ANSWER)]},
        [SYSTEM, *ASKED],
        "messages",
    ),
    "openai in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}, turns(QUESTION, ANSWER)[1]]},
        ASKED,
        "messages",
    ),
    "nemotron": (
        {
            "input": [{"role": "user", "content": QUESTION}],
            "output": ANSWER,
            "system_prompt": "Be brief.",
            "license": "cc",
        },
        [SYSTEM, *ASKED],
        "nemotron",
    ),
    "nemotron reasoning": (
        {"input": QUESTION, "output": f"<think>so</think>{ANSWER}", "reasoning": "on"},
        [("system", "detailed thinking on", False), ASKED[0], ("assistant", "<think>so</think>M31", True)],
        "nemotron",
    ),
    "prompt and completion": ({"prompt": QUESTION, "completion": ANSWER}, ASKED, "prompt"),
    "prompt and completion in turns": (
        {"prompt": turns(QUESTION), "completion": [turns(QUESTION, ANSWER)[1]]},
        ASKED,
        "prompt",
    ),
    "question and answer": ({"Question": QUESTION, "Response": ANSWER}, ASKED, "question"),
    "openorca": (
        {"id": "1", "system_prompt": "Be brief.", "question": QUESTION, "response": ANSWER},
        [SYSTEM, *ASKED],
        "question",
    ),
    "pairs": (
        {
            "conversation_id": 1,
            "conversation": [{"human": "Hi", "assistant": "Ho"}, {"human": QUESTION, "assistant": ANSWER}],
        },
        [("user", "Hi", False), ("assistant", "Ho", True), *ASKED],
        "messages",
    ),
    "columns": ({"messages": {"role": ["user", "assistant"], "content": [QUESTION, ANSWER]}}, ASKED, "messages"),
    "user and assistant": ({"user": QUESTION, "assistant": ANSWER}, ASKED, "question"),
    "prompt and history": (
        {
            "prompt": QUESTION,
            "response": ANSWER,
            "history": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
        },
        [("user", "Hi", False), ("assistant", "Ho", True), *ASKED],
        "prompt",
    ),
    "texts": ({"id": "1", "data": [QUESTION, ANSWER]}, ASKED, "texts"),
    "reasoning in a separate field": (
        {"question": QUESTION, "reasoning": "Think.", "answer": ANSWER},
        [ASKED[0], ("assistant", "<think>\nThink.\n</think>\n\nM31", True)],
        "question",
    ),
    **{
        f"reasoning in {key}": (
            {"messages": [turns(QUESTION)[0], {"role": "assistant", "content": ANSWER, key: "Think."}]},
            [ASKED[0], ("assistant", "<think>\nThink.\n</think>\n\nM31", True)],
            "messages",
        )
        for key in ("reasoning_content", "reasoning", "thinking")
    },
    "weight": ({"messages": switched("weight", 0, 1)}, TWO, "messages"),
    "weight zero only": ({"messages": switched("weight", 0.0, None)}, TWO, "messages"),
    "train": ({"messages": switched("train", False, True)}, TWO, "messages"),
    "loss": ({"messages": switched("loss", False, True)}, TWO, "messages"),
    "tool calls": (
        {"messages": called(tool_calls=[{"id": "1", "type": "function", "function": CALL}])},
        CALLED,
        "messages",
    ),
    "tool calls with text": (
        {"messages": called(tool_calls=[{"function": {"name": "simbad", "arguments": json.dumps(CALL["arguments"])}}])},
        CALLED,
        "messages",
    ),
    "function call": ({"messages": called(function_call=CALL)}, CALLED, "messages"),
    "sharegpt function call": (
        {
            "conversations": [
                {"from": "human", "value": "Where?"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "10.68"},
                {"from": "gpt", "value": "There."},
            ]
        },
        CALLED,
        "sharegpt",
    ),
}
ENDS = {"eot": "<|eot_id|>", "eom": "<|eom_id|>"}


def expected_text(expected: list[Turn]) -> tuple[str, str]:
    """(whole text, learned text), written by hand from the published format."""
    text, learned = "<|begin_of_text|>", ""
    for number, (role, words, learns) in enumerate(expected):
        waits = role == "assistant" and [*(r for r, _, _ in expected), ""][number + 1] == "ipython"
        said = words + (ENDS["eom"] if waits else ENDS["eot"])
        text += f"<|start_header_id|>{role}<|end_header_id|>\n\n{said}"
        learned += said if learns else ""
    return text, learned


def written(folder: Path, tokenizer: Tokenizer, number: int = 0) -> tuple[str, str]:
    """(text, learned text) of a conversation."""
    ids = IndexedFile(folder / "sft_a_document").document(number)
    labels = IndexedFile(folder / "sft_a_label_document").document(number)
    learned = labels[labels != IGNORE_INDEX]
    return tokenizer.decode(ids.tolist()), tokenizer.decode(learned.tolist())


def test_every_common_format_is_understood(vocab_folder: Path, hf_tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name, (record, expected, format_name) in UNDERSTOOD.items():
        folder = tmp_path / name
        folder.mkdir()
        source = write_records(folder / "in.jsonl", [record])
        assert preprocess_chats(vocab_folder, folder / "sft", f"a={source}") == 0, name
        assert written(folder, hf_tokenizer) == expected_text(expected), name
        header = json.loads((folder / "sft_a_document.json").read_text())
        assert header["chat"]["counts"]["formats"] == {format_name: 1}, name


GOOD = turns(QUESTION, ANSWER)
REFUSED: dict[str, dict[str, Any]] = {
    "'chosen' changes which tokens are learned": {"prompt": "x", "chosen": "a", "rejected": "b"},
    "'label' rates the completion": {"prompt": "x", "completion": "y", "label": False},
    "'images' changes which tokens are learned": {"messages": GOOD, "images": ["a.png"]},
    "'weight' is 0.5": {"messages": [GOOD[0], {**GOOD[1], "weight": 0.5}]},
    "'weight' of a whole record": {"messages": GOOD, "weight": 0},
    "marks a user turn as learned": {"messages": [{**GOOD[0], "train": True}, GOOD[1]]},
    "'mask' changes what is said or learned": {"messages": [GOOD[0], {**GOOD[1], "mask": True}]},
    "'refusal' changes what is said or learned": {"messages": [GOOD[0], {"role": "assistant", "refusal": "No."}]},
    "'is_trainable' is not known, and looks like a switch": {"messages": [GOOD[0], {**GOOD[1], "is_trainable": False}]},
    "'turn_weights' is not known, and looks like a switch": {"messages": GOOD, "turn_weights": [0, 1]},
    "'thoughts' is not known, and looks like reasoning": {"messages": [GOOD[0], {**GOOD[1], "thoughts": "hm"}]},
    "'available_tools' is not known, and looks like tools": {"messages": GOOD, "available_tools": [{"name": "f"}]},
    "'sysprompt' is not known, and looks like a system prompt": {"messages": GOOD, "sysprompt": "Be brief."},
    "the lists in 'messages' differ in length": {"messages": {"role": ["user"], "content": []}},
    "a part of the content is not text but image_url": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, GOOD[1]]
    },
    "2 tool calls in one turn": {"messages": called(tool_calls=[{"function": CALL}, {"function": CALL}])},
    "a tool call without function name": {"messages": called(tool_calls=[{"function": {"name": "x"}}])},
    "a tool call that is not JSON": {
        "conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "simbad()"}]
    },
    "the record has tools": {"messages": GOOD, "tools": [{"type": "function", "function": {"name": "f"}}]},
    "field 'tools' is text that is not JSON": {"messages": GOOD, "tools": "[{"},
    "the record's system prompt differs from that of the first turn": {
        "messages": [{"role": "system", "content": "A"}, *GOOD], "system": "B"
    },
    "output and response are alternatives": {"instruction": "x", "output": "a", "response": "b"},
    "messages and conversations are alternatives": {"messages": GOOD, "conversations": share_gpt("x", "y")},
    "two fields are named 'output'": {"instruction": "x", "output": "a", "Output": "a"},
    "role and from say different things": {"messages": [{**GOOD[0], "from": "gpt"}, GOOD[1]]},
    "reasoning in a field of its own and in <think>": {
        "messages": [GOOD[0], {"role": "assistant", "content": "<think>a</think>b", "reasoning": "c"}]
    },
    "its turn is ambiguous": {"messages": GOOD, "thinking": "hm"},
    "no answer": {"instruction": "x", "input": "y"},
    "the user says nothing": {"input": "", "output": "x"},
    "'history' is not a list of pairs": {"instruction": "x", "output": "y", "history": [["a"]]},
    "no conversation: expected": {"text": "x"},
    "not a list of objects": {"messages": GOOD, "tools": [1]},
}  # fmt: skip


def test_unsupported_fields_that_change_meaning_are_rejected(
    vocab_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for message, record in REFUSED.items():
        source = write_records(tmp_path / "in.jsonl", [{"messages": turns("good", "one")}, record])
        assert preprocess_chats(vocab_folder, tmp_path / "sft", f"a={source}") == 2, message
        error = capsys.readouterr().err
        assert message in error
        assert f"{source}, line 2: " in error
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    source = write_records(tmp_path / "in.jsonl", [{"messages": turns("good", "one")}, *REFUSED.values()])
    assert preprocess_chats(vocab_folder, tmp_path / "sft", f"a={source}", on_bad_record="skip") == 0
    rows = table_rows(capsys.readouterr().out)
    assert rows["a", "records read"] == str(len(REFUSED) + 1)
    assert rows["a", "conversations written"] == "1"
    dropped = {what: int(number) for (_, what), number in rows.items() if what.startswith("dropped: ")}
    assert sum(dropped.values()) == len(REFUSED)
    assert dropped["dropped: key chosen"] == dropped["dropped: several calls in one turn"] == 1
    header = json.loads((tmp_path / "sft_a_document.json").read_text())
    assert {f"dropped: {rule}": n for rule, n in header["chat"]["counts"]["dropped"].items()} == dropped


def test_unknown_keys_are_named_and_counted_once_per_source(
    vocab_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"id": i, "messages": turns(f"{i}?", f"{i}."), **({"score": 1} if i % 2 else {})} for i in range(10)]
    for record in records[:3]:
        record["messages"][0] |= {"emotion": "joy", "name": None, "tool_calls": None}
    source = write_records(tmp_path / "in.jsonl", records)
    other = write_records(tmp_path / "b.jsonl", [{"instruction": "x", "output": "y"}])
    assert preprocess_chats(vocab_folder, tmp_path / "sft", f"a={source}", f"b={other}") == 0
    rows = table_rows(capsys.readouterr().out)
    unknown = {(source, what): int(n) for (source, what), n in rows.items() if what.startswith("unknown")}
    assert unknown == {
        ("a", "unknown key: id"): 10,
        ("a", "unknown key: score"): 5,
        ("a", "unknown key: emotion (of a turn)"): 3,
    }
    assert rows["b", "format alpaca"] == "1"


def test_rows_of_parquet_are_the_records_that_they_were_made_of(
    vocab_folder: Path, hf_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """A Parquet table gives every call the arguments of all other calls, as null."""
    records = [
        {"messages": called(tool_calls=[{"function": {"name": name, "arguments": arguments}}])}
        for name, arguments in (("simbad", {"object": "M31"}), ("weather", {"place": "Paranal", "hours": 3}))
    ]
    rows = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), rows)
    assert preprocess_chats(vocab_folder, tmp_path / "sft", f"a={rows}") == 0
    lines = write_records(tmp_path / "in.jsonl", records)
    (tmp_path / "lines").mkdir()
    assert preprocess_chats(vocab_folder, tmp_path / "lines/sft", f"a={lines}") == 0
    for number in range(2):
        assert written(tmp_path, hf_tokenizer, number) == written(tmp_path / "lines", hf_tokenizer, number)
    assert '"parameters": {"object": "M31"}}' in written(tmp_path, hf_tokenizer)[0]
