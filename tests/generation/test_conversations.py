"""Prompts of conversations equal the beginning of a training conversation in every format; bad lines of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples.demo_tokenizer import CHAT_TEMPLATE
from megatron.common.errors import UserError
from megatron.generation.conversations import ChatPrompts, read_request
from megatron.generation.requests import PromptReader
from megatron.tokenizer import Tokenizer
from megatron.tokenizer.chat import ids_and_labels
from megatron.tokenizer.chat_template import TEMPLATE_FOLDER, ChatTemplate
from megatron.tokenizer.conversation import THINK_BEGIN, Conversation, Message
from tests.support.chat_templates import SPECIAL
from tests.support.models import Case
from tests.support.vocabulary import encode_chat

pytestmark = pytest.mark.unit

QUESTION = [Message("user", "What is z?\n"), Message("assistant", "Redshift."), Message("user", "And <|eot_id|>?")]


@pytest.fixture(params=["llama3", "template", "shipped"])
def prompts(request: pytest.FixtureRequest, hf_tokenizer: Tokenizer, tmp_path: Path) -> Any:
    """A function that makes ChatPrompts from a system prompt and a thinking switch."""
    template = None
    if request.param == "template":
        (tmp_path / "chat.jinja").write_text(CHAT_TEMPLATE)
        template = str(tmp_path / "chat.jinja")
    if request.param == "shipped":
        template = "llama3.1"
    return lambda system, thinking: ChatPrompts.load(template, hf_tokenizer, system, thinking)


@pytest.mark.parametrize("system", [None, "Be an astronomer."])
@pytest.mark.parametrize("thinking", [None, True, False])
def test_a_prompt_begins_the_training_conversation(
    prompts: Any, hf_tokenizer: Tokenizer, system: str | None, thinking: bool | None
) -> None:
    made = prompts(system, thinking)
    lines = [{True: "detailed thinking on", False: "detailed thinking off", None: None}[thinking], system]
    text = "\n\n".join(line for line in lines if line is not None)
    answer = "<think>\nA letter.\n</think>\n\nIt ends a turn." if thinking else "It ends a turn."
    turns = [*([Message("system", text)] if text else []), *QUESTION, Message("assistant", answer)]
    whole, labels = encode_chat(made.chat, hf_tokenizer, turns, "last")
    ids = made.ids(Conversation(QUESTION))
    assert whole[: len(ids)] == ids
    begun = hf_tokenizer.encode(THINK_BEGIN) if thinking else []
    assert ids[len(ids) - len(begun) :] == begun
    assert labels[len(ids) - len(begun) - 1] < 0 <= labels[len(ids) - len(begun)], (
        "generation begins where learning does"
    )
    assert whole[-1] in made.chat.end_of_turn
    assert ids.count(hf_tokenizer.token_id("<|begin_of_text|>")) == 1


def test_the_prefill_has_the_newline_in_it(hf_tokenizer: Tokenizer) -> None:
    """Without it, `<think>` may end in a token that never occurs there in training, as the mutation shows."""
    whole = hf_tokenizer.encode("<think>\nA letter.")
    assert whole[: len(hf_tokenizer.encode(THINK_BEGIN))] == hf_tokenizer.encode(THINK_BEGIN)
    assert hf_tokenizer.decode(hf_tokenizer.encode(THINK_BEGIN)) == "<think>\n"


def test_a_system_turn_of_its_own_wins(prompts: Any, hf_tokenizer: Tokenizer) -> None:
    made = prompts("default", True)
    text = hf_tokenizer.decode(made.ids(Conversation([Message("system", "own"), Message("user", "Hi")])))
    assert "detailed thinking on\n\nown" in text
    assert "default" not in text


def test_a_conversation_ends_with_the_user(prompts: Any) -> None:
    for turns in ([], QUESTION[:2]):
        with pytest.raises(UserError, match="last turn of a conversation"):
            prompts(None, None).ids(Conversation(turns))


def test_bad_lines_are_requests_with_an_error(hf_tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat = ChatPrompts.load(None, hf_tokenizer, None, None)
    lines = [
        b'{"prompt": "good", "id": 7}',
        b"",
        b'"text"',
        b'{"prompt": 3}',
        b"{",
        b'{"text": "x"}',
        b'{"messages": [{"role": "user", "content": "Hi"}]}',
        b'{"messages": [{"role": "boss", "content": "Hi"}]}',
        b'{"messages": [{"role": "user", "content": "Hi", "name": "x"}]}',
        b"\xff",
        json.dumps({"prompt": "long " * 200}).encode(),
    ]
    (tmp_path / "p.jsonl").write_bytes(b"\n".join(lines))
    args = Case(vocab=1024, seq=64).neox(world_size=1)
    reasons = [r.error or "" for r in PromptReader(args, hf_tokenizer, chat).file(tmp_path / "p.jsonl")]
    expected = ["", "", "line 4: prompt is of type int", "line 5: not JSON", 'line 6: expected a text, {"prompt"', ""]
    expected += ["line 8: turn 1: the role 'boss' does not exist", "line 9: turn 1: name not known"]
    expected += ["line 10: not UTF-8 text", "line 11: it has"]
    assert [found[: len(want)] for found, want in zip(reasons, expected, strict=True)] == expected
    assert [bool(found) for found in reasons] == [bool(want) for want in expected]
    plain = PromptReader(args, hf_tokenizer, None).file(tmp_path / "p.jsonl")
    assert "add chat: true" in (plain[5].error or "")
    assert plain[0].fields == {"id": 7}
    assert plain[0].ids == [hf_tokenizer.bos, *hf_tokenizer.encode("good")]


def test_a_text_from_nothing_begins_with_one_token(hf_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin-of-text, or end-of-document if the vocabulary has no such token (GPT-2)."""
    reader = PromptReader(Case(vocab=1024).neox(world_size=1), hf_tokenizer, None)
    assert [request.ids for request in reader.unconditional()] == [[hf_tokenizer.bos]]
    monkeypatch.setattr(hf_tokenizer, "bos", None)
    assert [request.ids for request in reader.unconditional()] == [[hf_tokenizer.eod]]


def test_a_file_without_prompts_is_refused(hf_tokenizer: Tokenizer, tmp_path: Path) -> None:
    reader = PromptReader(Case(vocab=1024).neox(world_size=1), hf_tokenizer, None)
    (tmp_path / "p.txt").write_text("\n \n")
    for name, reason in (("p.txt", "has no prompt"), ("none.txt", "No such file")):
        with pytest.raises(UserError, match=reason):
            reader.file(tmp_path / name)


SEARCH = {"type": "function", "function": {"name": "search", "description": "Finds.", "parameters": {"type": "object"}}}
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "How far is M31?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "search", "arguments": {"query": "M31"}}}],
    },
    {"role": "tool", "content": "765 kpc"},
    {"role": "assistant", "content": "765 kpc.", "weight": 1},
    {"role": "user", "content": "In light years?"},
]


@pytest.mark.parametrize(("template", "tools"), [("llama3.1", [SEARCH]), ("llama3.1", None), (None, None)])
def test_tool_calls_are_written_as_in_training(template: str | None, tools: Any, hf_tokenizer: Tokenizer) -> None:
    """The prompt is the beginning of the training conversation; with a template, its rendering by `transformers`."""
    from tools.datasets.encoding.conversations import read_conversation

    chat = ChatPrompts.load(template, hf_tokenizer, None, None)
    fields = {"id": 3, **({"tools": tools} if tools else {})}
    ids = chat.ids(read_request(CALLED, fields))
    assert fields == {"id": 3}  # fields that were used are not passed on
    record = {"messages": [*CALLED, {"role": "assistant", "content": "2.5 million."}]}
    trained = read_conversation(record | ({"tools": tools} if tools else {})).conversation
    segments = chat.chat.segments(trained, "last")
    texts = [segment.text for segment in segments if segment.text is not None]
    whole, _ = ids_and_labels(segments, [hf_tokenizer.encode(text) for text in texts])
    assert ids == whole[: len(ids)]
    text = hf_tokenizer.decode(ids)
    assert text.endswith("In light years?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert '"query": "M31"' in text
    assert ("Finds." in text) == bool(tools)
    if template is not None:
        source = (TEMPLATE_FOLDER / f"{template}.jinja").read_text()
        assert text == ChatTemplate(source, SPECIAL).render(CALLED, tools, None, prompt=True)


@pytest.mark.parametrize(
    ("messages", "fields", "message"),
    [
        ([{"role": "user", "content": "x", "mood": "glad"}], {}, "turn 1: mood not known"),
        ([{"role": "user", "content": "x", "tool_calls": [{"a": 1}]}], {}, "tool calls in a turn of the user"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{"a": 1}]}], {}, "without function name"),
        ([{"role": "user", "content": "x"}], {"tools": "search"}, "tools: expected a list of objects"),
        ([{"role": "user", "content": "x"}], {"chat_template_kwargs": 3}, "chat_template_kwargs: expected an object"),
        ([], {}, "expected a list of turns"),
    ],
)
def test_what_is_not_understood_is_refused(messages: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_request(messages, fields)


def test_tools_need_a_format_that_has_a_place_for_them(hf_tokenizer: Tokenizer) -> None:
    chat = ChatPrompts.load(None, hf_tokenizer, None, None)
    with pytest.raises(UserError, match="the record has tools, which Meta's format does not support"):
        chat.ids(read_request(CALLED, {"tools": [SEARCH]}))
