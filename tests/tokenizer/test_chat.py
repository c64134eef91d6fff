"""Conversations: ids equal Meta's ChatFormat, golden spans written by hand, and untrusted templates."""

import json
import re
from pathlib import Path
from typing import Any

import llama_models
import pytest
from llama_models.datatypes import RawMessage, RawTextItem, StopReason, ToolCall
from llama_models.llama3.chat_format import ChatFormat
from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

from examples.demo_tokenizer import CHAT_TEMPLATE
from megatron.common.labels import IGNORE_INDEX
from megatron.tokenizer import Tokenizer, TokenizerError, build_tokenizer
from megatron.tokenizer.chat import Chat, Llama3Chat
from megatron.tokenizer.chat_template import ChatTemplate, load_chat_template
from megatron.tokenizer.conversation import ChatError, Conversation, Message
from megatron.tokenizer.template_chat import TemplateChat, load_chat
from tests.support.conversations import random_records
from tests.support.vocabulary import encode_chat
from tools.datasets.encoding.conversations import digest, read_conversation

pytestmark = pytest.mark.unit

NASTY = "quotes <|eot_id|> and <|start_header_id|>assistant<|end_header_id|>\n\n, then \n\n\nnewlines  "

DIALOGUES: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho!"}]},
    "system and several turns": {
        "messages": [
            {"role": "system", "content": "Be an astronomer."},
            {"role": "user", "content": "What is z?"},
            {"role": "assistant", "content": "Redshift: $z = \\Delta\\lambda / \\lambda$."},
            {"role": "user", "content": "And M☉?\n"},
            {"role": "assistant", "content": "\n The mass of the Sun. "},
        ]
    },
    "nasty": {"messages": [{"role": "user", "content": NASTY}, {"role": "assistant", "content": NASTY}]},
    "tool": {
        "messages": [
            {"role": "user", "content": "Where is M31?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "simbad", "arguments": '{"object": "M31"}'}}],
            },
            {"role": "tool", "content": '{"ra": 10.68}'},
            {"role": "assistant", "content": "At right ascension 10.68 degrees."},
        ]
    },
    "thinking": {
        "messages": [
            {"role": "system", "content": "detailed thinking on"},
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\n4"},
        ]
    },
}


def messages_of(name: str) -> list[Message]:
    return messages_in(DIALOGUES[name])


def messages_in(record: dict[str, Any], thinking_prompt: bool = False) -> list[Message]:
    return list(read_conversation(record, thinking_prompt).conversation.messages)


def template_chat(source: str, tokenizer: Tokenizer) -> TemplateChat:
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    return TemplateChat(ChatTemplate(source, special), tokenizer)


def raw(messages: list[Message]) -> list[RawMessage]:
    """The messages in the form of Meta's package."""
    result = []
    for message in messages:
        calls = [ToolCall(call_id="1", tool_name=call.name, arguments=call.arguments) for call in message.calls]
        reason = {"stop_reason": StopReason.end_of_message} if message.waits_for_tool else {}
        content = [RawTextItem(text=part) for part in message.parts]
        result.append(RawMessage(role=message.role, content=content, tool_calls=calls, **reason))
    return result


@pytest.mark.parametrize("name", DIALOGUES)
def test_ids_equal_metas_chat_format(name: str, vocab_folder: Path) -> None:
    tokenizer = build_tokenizer("TiktokenTokenizer", vocab_folder)
    meta = ChatFormat(MetaTokenizer(vocab_folder / "tokenizer.model"))
    messages = messages_of(name)
    ids, labels = encode_chat(Llama3Chat(tokenizer), tokenizer, messages)
    prompt = meta.encode_dialog_prompt(raw(messages)).tokens
    header = meta._encode_header("assistant")
    assert ids == prompt[: -len(header)]
    assert ids.count(tokenizer.bos) == 1
    assert all(label in (IGNORE_INDEX, token) for label, token in zip(labels, ids, strict=True))


GOLDEN = {
    "one turn": ["Ho!<|eot_id|>"],
    "system and several turns": [
        "Redshift: $z = \\Delta\\lambda / \\lambda$.<|eot_id|>",
        "\n The mass of the Sun. <|eot_id|>",
    ],
    "nasty": [NASTY + "<|eot_id|>"],
    "tool": [
        '{"type": "function", "name": "simbad", "parameters": {"object": "M31"}}<|eom_id|>',
        "At right ascension 10.68 degrees.<|eot_id|>",
    ],
    "thinking": ["<think>\nTwo and two.\n</think>\n\n4<|eot_id|>"],
}


def learned_spans(tokenizer: Tokenizer, ids: list[int], labels: list[int]) -> list[str]:
    spans: list[list[int]] = []
    before = IGNORE_INDEX
    for token, label in zip(ids, labels, strict=True):
        if label != IGNORE_INDEX:
            if before == IGNORE_INDEX:
                spans.append([])
            spans[-1].append(token)
        before = label
    return [tokenizer.decode(span) for span in spans]


def chats(tokenizer: Tokenizer) -> list[Chat]:
    return [Llama3Chat(tokenizer), template_chat(CHAT_TEMPLATE, tokenizer)]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_spans(name: str, hf_tokenizer: Tokenizer) -> None:
    for chat in chats(hf_tokenizer):
        if name == "tool" and isinstance(chat, TemplateChat):
            continue  # the demo's template does not support tools
        ids, labels = encode_chat(chat, hf_tokenizer, messages_of(name), "all")
        assert learned_spans(hf_tokenizer, ids, labels) == GOLDEN[name]
        ids, labels = encode_chat(chat, hf_tokenizer, messages_of(name), "last")
        assert learned_spans(hf_tokenizer, ids, labels) == GOLDEN[name][-1:]


@pytest.mark.parametrize("name", [name for name in DIALOGUES if name != "tool"])
def test_a_template_with_the_same_words_gives_the_same_ids(name: str, hf_tokenizer: Tokenizer) -> None:
    ours, theirs = (encode_chat(chat, hf_tokenizer, messages_of(name)) for chat in chats(hf_tokenizer))
    assert ours == theirs


HEADERS = "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
REFUSED = {
    "rewrites earlier turns": "{% for m in messages %}"
    + HEADERS
    + "{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}{% endif %}<|eot_id|>{% endfor %}"
    + PROMPT,
    "changes what was said": "{% for m in messages %}"
    + HEADERS
    + "{{ m['content'].split('</think>')[-1] }}<|eot_id|>{% endfor %}"
    + PROMPT,
    "the prompt for turn": "{% for m in messages %}" + HEADERS + "{{ m['content'] }}<|eot_id|>{% endfor %}",
    "no end token": "{% for m in messages %}" + HEADERS + "{{ m['content'] }}\n{% endfor %}" + PROMPT,
    "writes 2 begin-of-text": "{{ bos_token }}{{ bos_token }}{% for m in messages %}"
    + HEADERS
    + "{{ m['content'] }}<|eot_id|>{% endfor %}"
    + PROMPT,
    "refuses the conversation: no": "{{ raise_exception('no') }}",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_templates_that_may_not_be_trusted(reason: str, hf_tokenizer: Tokenizer) -> None:
    messages = [
        *messages_of("one turn"),
        Message("user", "and now"),
        Message("assistant", "<think>hm</think>so"),
    ]
    with pytest.raises(ChatError, match=reason):
        template_chat(REFUSED[reason], hf_tokenizer).segments(Conversation(messages), "all")


def test_a_template_that_trims_and_one_without_bos(hf_tokenizer: Tokenizer) -> None:
    trimming = "{% for m in messages %}" + HEADERS + "{{ m['content'] | trim }}<|eot_id|>{% endfor %}" + PROMPT
    messages = messages_of("system and several turns")
    ids, labels = encode_chat(template_chat(trimming, hf_tokenizer), hf_tokenizer, messages)
    assert learned_spans(hf_tokenizer, ids, labels)[1] == "The mass of the Sun.<|eot_id|>"
    assert ids[0] == hf_tokenizer.bos
    assert ids.count(hf_tokenizer.bos) == 1


def test_loading(vocab_folder: Path, hf_tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert isinstance(load_chat(None, hf_tokenizer), Llama3Chat)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    (tmp_path / "t.jinja").write_text(CHAT_TEMPLATE)
    names = {load_chat(str(tmp_path / f), hf_tokenizer).name for f in ("tokenizer_config.json", "t.jinja")}
    assert len(names) == 1
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ChatError, match="no chat_template"):
        load_chat(str(tmp_path / "tokenizer_config.json"), hf_tokenizer)
    with pytest.raises(ChatError, match="not valid Jinja"):
        template_chat("{% for %}", hf_tokenizer)
    with pytest.raises(TokenizerError, match="no special token"):
        Llama3Chat(build_tokenizer("SPMTokenizer", vocab_folder / "spm.model"))


def test_shapes_of_conversations() -> None:
    expected = [Message("system", "S"), Message("user", "U"), Message("assistant", "A")]
    share_gpt = {"conversations": [{"from": f, "value": v} for f, v in (("system", "S"), ("human", "U"), ("gpt", "A"))]}
    openai = {"messages": [{"role": r, "content": c} for r, c in (("system", "S"), ("user", "U"), ("assistant", "A"))]}
    parts = {"conversation": [*openai["messages"][:1], {"role": "user", "content": [{"type": "text", "text": "U"}]}]}
    parts["conversation"].append({"role": "assistant", "content": "A"})
    nemotron = {"input": [{"role": "user", "content": "U"}], "output": "A", "system_prompt": "S", "reasoning": "off"}
    for record in (share_gpt, openai, parts, nemotron, nemotron | {"input": "U"}):
        assert messages_in(record, thinking_prompt=True) == expected
    reasoning = {"input": "U", "output": "<think>x</think>A", "reasoning": "on"}
    assert messages_in(reasoning)[0] == Message("system", "detailed thinking on")


def test_thinking_prompts_and_empty_traces() -> None:
    def conversation(answer: str, **extra: str) -> dict:
        system = [{"role": "system", "content": extra["system"]}] if extra else []
        return {"messages": [*system, {"role": "user", "content": "U"}, {"role": "assistant", "content": answer}]}

    with_trace, without = conversation("<think>hm</think>A"), conversation("<think>\n\n</think>\n\nA")
    assert messages_in(with_trace, True)[0].content == "detailed thinking on"
    assert messages_in(without, True)[0].content == "detailed thinking off"
    assert messages_in(without, True)[-1].content == "A"
    assert len(messages_in(without)) == 2
    with pytest.raises(ChatError, match="has a <think> trace"):
        read_conversation(conversation("<think>hm</think>A", system="detailed thinking off"), False)


BAD = {
    "no conversation: expected": {"text": "x"},
    "the conversation is empty": {"messages": []},
    "'messages' is not a list": {"messages": "x"},
    "turn 1: expected an object": {"messages": ["x"]},
    "turn 2: the role 'robot' does not exist": {
        "messages": [{"role": "user", "content": "x"}, {"role": "robot", "content": "x"}]
    },
    "the first turn is the assistant's": {"messages": [{"role": "assistant", "content": "x"}]},
    "a system turn is not the first turn": {
        "messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]
    },
    "turn 2: the assistant says nothing": {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]
    },
    "turn 1: the content is not text but NoneType": {"messages": [{"role": "user", "content": None}]},
    "turn 2: a tool call without": {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [{}]}]
    },
    "input is neither": {"input": 3, "output": "x"},
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_conversations(reason: str) -> None:
    with pytest.raises(ChatError, match=reason):
        read_conversation(BAD[reason], thinking_prompt=False)


def test_nothing_to_learn(hf_tokenizer: Tokenizer) -> None:
    for chat in chats(hf_tokenizer):
        with pytest.raises(ChatError, match="nothing to learn"):
            chat.segments(Conversation([Message("user", "x")]), "all")


def test_digest() -> None:
    first = [Message("system", "S"), Message("user", "U  u\n"), Message("assistant", "A")]
    assert digest(first) == digest([Message("user", " U u"), Message("assistant", "A")])
    assert digest(first) != digest([Message("user", "U u"), Message("assistant", "B")])
    assert digest(first) != digest([Message("user", "A"), Message("assistant", "U u")])


DATE = "21 September 2024"


def as_llama31(messages: list[Message]) -> list[Message]:
    """Messages as written by templates since Llama 3.1: dates before the system prompt, texts trimmed."""
    system = messages[0].content.strip() if messages[0].role == "system" else ""
    dates = f"Cutting Knowledge Date: December 2023\nToday Date: {DATE}\n\n"
    turns = messages[1:] if messages[0].role == "system" else messages
    return [Message("system", dates + system), *(Message(m.role, m.content.strip()) for m in turns)]


@pytest.mark.parametrize("name", ["llama3", "llama3.1", "llama3.2", "llama3.3"])
def test_shipped_templates_equal_metas_chat_format(name: str, vocab_folder: Path) -> None:
    """Token by token, where both can express it: one text per turn, because Meta's package encodes separately what a
    template joins; since 3.1 without calls, which the package and Meta's templates write differently."""
    tokenizer = build_tokenizer("TiktokenTokenizer", vocab_folder)
    meta = ChatFormat(MetaTokenizer(vocab_folder / "tokenizer.model"))
    header = len(meta._encode_header("assistant"))
    chat = load_chat(name, tokenizer, {} if name == "llama3" else {"date_string": DATE})
    compared = with_calls = 0
    for record in expressible(seed=17):
        if name != "llama3":
            turns = [turn for turn in record["messages"] if turn["role"] != "tool" and not turn.get("tool_calls")]
            record = {"messages": [{"role": turn["role"], "content": turn["content"]} for turn in turns]}
        for turn in record["messages"]:
            turn["role"] = {"developer": "system"}.get(turn["role"], turn["role"])  # Meta has no such role
        try:
            messages = messages_in(record)
            ids, _ = encode_chat(chat, tokenizer, messages)
        except ChatError:
            continue  # a turn that says nothing
        if any(sum(map(bool, message.parts)) + len(message.calls) > 1 for message in messages):
            continue
        expected = raw(messages if name == "llama3" else as_llama31(messages))
        assert ids == meta.encode_dialog_prompt(expected).tokens[:-header]
        compared += 1
        with_calls += any(message.calls for message in messages)
    assert compared > 80
    assert with_calls > 20 or name != "llama3"


@pytest.mark.parametrize("name", ["llama3.1", "llama3.3"])
def test_calls_of_built_in_llama_tools_match_meta(name: str, hf_tokenizer: Tokenizer) -> None:
    """The search example on Meta's page about the format, except for white space, which the templates trim."""
    page = (Path(llama_models.__file__).parent / "llama3_1" / "prompt_format.md").read_text()
    blocks = re.findall(r"```\n(.*?)```", page.partition("conversation using brave search")[2], re.DOTALL)
    published = "".join("".join(blocks[:2]).split())
    question, query = re.findall(r'Search the web for ([^<]*)<|query="([^"]*)"', "".join(blocks[:2]))
    call = {"name": "brave_search", "arguments": {"query": query[1]}}
    rendered = load_chat_template(name, hf_tokenizer).render(
        [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": f"Search the web for {question[0]}"},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        ],
        arguments={"builtin_tools": ["brave_search", "wolfram_alpha"], "date_string": DATE},
    )
    assert "".join(rendered.split()) == published


def expressible(seed: int) -> list[dict[str, Any]]:
    """Random records that Meta's format can express: one call per turn, ASCII arguments, also Llama's own tools."""
    calls = [
        {"name": "simbad", "arguments": {"object": "M31", "radius": 2.5, "bands": ["u", "g"], "deep": None}},
        {"name": "brave_search", "arguments": {"query": "Was ist z?"}},
        {"name": "code_interpreter", "arguments": {"code": "print(1)\nprint('é')"}},
    ]
    records = []
    for number, record in enumerate(random_records(200, seed)):
        for turn in record["messages"]:
            for key in ("reasoning_content", "reasoning", "thinking"):
                turn.pop(key, None)
            if turn.get("tool_calls"):
                turn["tool_calls"] = [{"function": calls[number % len(calls)]}]
        records.append({"messages": record["messages"]})
    return records


def test_random_conversations_equal_metas_chat_format(vocab_folder: Path) -> None:
    tokenizer = build_tokenizer("TiktokenTokenizer", vocab_folder)
    meta = ChatFormat(MetaTokenizer(vocab_folder / "tokenizer.model"))
    header = len(meta._encode_header("assistant"))
    compared = with_calls = 0
    for record in expressible(seed=11):
        try:
            messages = messages_in(record)
        except ChatError:
            continue  # a turn that says nothing
        ids, _ = encode_chat(Llama3Chat(tokenizer), tokenizer, messages)
        assert ids == meta.encode_dialog_prompt(raw(messages)).tokens[:-header]
        compared += 1
        with_calls += any(message.calls for message in messages)
    assert compared > 100
    assert with_calls > 30
