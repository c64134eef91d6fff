"""Data equals a template's rendering, and the learned part is what the assistant would generate."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import pytest

from megatron.common.labels import IGNORE_INDEX
from megatron.data.indexed import IndexedFile
from megatron.tokenizer import Tokenizer
from megatron.tokenizer.chat import Llama3Chat
from megatron.tokenizer.chat_template import TEMPLATE_FOLDER, ChatTemplate
from megatron.tokenizer.conversation import ChatError, Conversation, learned_turns
from megatron.tokenizer.template_chat import TemplateChat
from tests.support.chat_templates import GENERATION, NAMED, SINGLE, SPECIAL, transformers_tokenizer
from tests.support.conversations import random_records
from tests.support.data_commands import preprocess_chats
from tests.support.text_files import write_records
from tests.support.vocabulary import encode_conversation
from tools.datasets.encoding.conversations import digest, read_conversation

pytestmark = pytest.mark.unit

COUNT = 300
LEAST = {"llama3": 80, "llama3.1": 60, "llama3.2": 60, "llama3.3": 60, "generation": 30, "tools": 60, "reasoning": 30}


def template_of(name: str) -> str:
    path = TEMPLATE_FOLDER / f"{name}.jinja"
    return path.read_text() if path.exists() else {"generation": GENERATION, **SINGLE}[name]


def readable() -> list[tuple[dict[str, Any], Conversation]]:
    """Random records that are valid conversations, all different, with the conversations read from them."""
    found: dict[bytes, tuple[dict[str, Any], Conversation]] = {}
    for record in random_records(COUNT, seed=5):
        try:
            conversation = read_conversation(record).conversation
        except ChatError:
            continue
        found.setdefault(digest(conversation.messages), (record, conversation))
    return list(found.values())


def rendered(theirs: Any, conversation: Conversation, turns: int | None = None, **options: Any) -> str:
    """The rendering by transformers; empty if it refuses."""
    try:
        return _rendered(theirs, conversation, turns, **options)
    except (TypeError, ValueError, jinja2.TemplateError):
        return ""


def _rendered(theirs: Any, conversation: Conversation, turns: int | None, **options: Any) -> str:
    return theirs.apply_chat_template(
        [dict(message.as_fields()) for message in conversation.messages[:turns]],
        tools=conversation.tools,
        documents=conversation.documents,
        tokenize=False,
        **{**conversation.template_arguments, **options},
    )


def with_bos(text: str) -> str:
    return text if text.startswith(SPECIAL["bos_token"]) else SPECIAL["bos_token"] + text


@pytest.mark.parametrize("name", LEAST)
def test_data_equals_the_rendering_of_transformers(
    name: str, vocab_folder: Path, hf_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    theirs = transformers_tokenizer(vocab_folder, template_of(name))
    chat = TemplateChat(ChatTemplate(template_of(name), SPECIAL), hf_tokenizer)
    accepted, texts = [], []
    for record, conversation in readable():
        try:
            ids, labels = encode_conversation(chat, hf_tokenizer, conversation)
        except ChatError:
            continue
        plain = Conversation(
            [message.plain() for message in conversation.messages],
            conversation.tools,
            conversation.documents,
            conversation.template_arguments,
        )
        text = hf_tokenizer.decode(ids)
        assert text in (with_bos(rendered(theirs, conversation)), with_bos(rendered(theirs, plain)))
        used = conversation if text == with_bos(rendered(theirs, conversation)) else plain
        check_labels(theirs, used, hf_tokenizer, ids, labels)
        accepted.append(record)
        texts.append(text)
    assert len(accepted) >= LEAST[name]
    (tmp_path / "template.jinja").write_text(template_of(name))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SPECIAL))
    source = write_records(tmp_path / "in.jsonl", accepted)
    template = str(tmp_path / "template.jinja")
    assert preprocess_chats(vocab_folder, tmp_path / "sft", f"a={source}", chat_template=template) == 0
    written = [hf_tokenizer.decode(ids.tolist()) for ids in IndexedFile(tmp_path / "sft_a_document")]
    assert written == texts


def check_labels(
    theirs: Any, conversation: Conversation, tokenizer: Tokenizer, ids: list[int], labels: list[int]
) -> None:
    """Every learned turn begins where its prompt ends, is complete, and ends with a special token."""
    special = set(tokenizer.special_tokens.values())
    starts = [i for i, label in enumerate(labels) if label != IGNORE_INDEX and labels[i - 1] == IGNORE_INDEX]
    turns = sorted(learned_turns(conversation.messages, "all"))
    assert len(starts) == len(turns)
    for start, turn in zip(starts, turns, strict=True):
        stop = next((i for i in range(start, len(ids)) if labels[i] == IGNORE_INDEX), len(ids))
        assert ids[stop - 1] in special
        before, said = tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:stop])
        assert before == with_bos(rendered(theirs, conversation, turn, add_generation_prompt=True))
        message = conversation.messages[turn]
        assert "".join(message.content.split()) in "".join(said.split())
        assert all(call.name in said for call in message.calls)


def test_generation_blocks_give_the_mask_of_transformers(vocab_folder: Path, hf_tokenizer: Tokenizer) -> None:
    theirs = transformers_tokenizer(vocab_folder, GENERATION)
    chat = TemplateChat(ChatTemplate(GENERATION, SPECIAL), hf_tokenizer)
    compared = 0
    for _, conversation in readable():
        if "<|" in str(conversation.messages):
            continue  # transformers turns quoted names into special tokens
        try:
            _, labels = encode_conversation(chat, hf_tokenizer, conversation)
        except ChatError:
            continue
        found = theirs.apply_chat_template(
            [dict(message.plain().as_fields()) for message in conversation.messages],
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        pairs = zip(found["input_ids"], found["assistant_masks"], strict=True)
        assert [label for label in labels if label != IGNORE_INDEX] == [i for i, mask in pairs if mask]
        compared += 1
    assert compared > 20


def test_the_exported_template_writes_what_the_llama3_format_writes(hf_tokenizer: Tokenizer) -> None:
    ours = Llama3Chat(hf_tokenizer)
    assert ours.template is not None
    template = TemplateChat(ChatTemplate(ours.template, SPECIAL), hf_tokenizer)
    compared = 0
    for _, conversation in readable():
        try:
            ids, labels = encode_conversation(ours, hf_tokenizer, conversation)
        except ChatError:
            continue
        other, other_labels = encode_conversation(template, hf_tokenizer, conversation)
        assert hf_tokenizer.decode(other) == hf_tokenizer.decode(ids)
        learned, other_learned = (
            hf_tokenizer.decode([label for label in some if label != IGNORE_INDEX]) for some in (labels, other_labels)
        )
        assert other_learned == learned
        compared += 1
    assert compared > 60


LEFT_OUT: dict[str, tuple[str, dict[str, Any]]] = {
    "leaves out or changes what was said in turn 1 (system)": (
        "{% for m in messages if m.role != 'system' %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{{ m.content }}<|eot_id|>{% endfor %}",
        {"system": "Be brief."},
    ),
    "the record has tools, and the chat template does not write them": (GENERATION, {"tools": [{"name": "f"}]}),
    "the record has documents, and the chat template does not write": (GENERATION, {"documents": [{"text": "f"}]}),
    "the reasoning": (GENERATION, {"reasoning": "Think."}),
}


@pytest.mark.parametrize("message", LEFT_OUT)
def test_content_dropped_by_a_template_is_rejected(message: str, hf_tokenizer: Tokenizer) -> None:
    source, more = LEFT_OUT[message]
    record: Mapping[str, Any] = {"question": "Name a galaxy.", "answer": "M31", **more}
    chat = TemplateChat(ChatTemplate(source, SPECIAL), hf_tokenizer)
    with pytest.raises(ChatError, match="chat template") as caught:
        chat.segments(read_conversation(record).conversation, "all")
    assert message in str(caught.value)


def test_tools_choose_the_template(hf_tokenizer: Tokenizer) -> None:
    chat = TemplateChat(ChatTemplate(NAMED, SPECIAL), hf_tokenizer)
    tool = {"type": "function", "function": {"name": "simbad", "parameters": {"größe": 1}}}
    record = {"question": "Name a galaxy.", "answer": "M31"}
    plain, with_tools = (
        hf_tokenizer.decode(encode_conversation(chat, hf_tokenizer, read_conversation(r).conversation)[0])
        for r in (record, {**record, "tools": [tool]})
    )
    assert "<tools>" not in plain
    assert '<tools>\n{"type": "function", "function": {"name": "simbad", "parameters": {"größe": 1}}}' in with_tools


def test_arguments_as_text_and_contents_in_parts_are_rendered_unchanged(hf_tokenizer: Tokenizer) -> None:
    arguments = {"object": "Ångström", "radius": 2}
    call = {"function": {"name": "simbad", "arguments": json.dumps(arguments, ensure_ascii=False)}}
    record = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Wo?"}]},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "10.68"},
            {"role": "assistant", "content": "Dort."},
        ]
    }
    chat = TemplateChat(ChatTemplate(template_of("llama3.1"), SPECIAL), hf_tokenizer)
    ids, _ = encode_conversation(chat, hf_tokenizer, read_conversation(record).conversation)
    text = hf_tokenizer.decode(ids)
    assert '{"name": "simbad", "parameters": {"object": "Ångström", "radius": 2}}<|eot_id|>' in text
    assert "<|end_header_id|>\n\nWo?<|eot_id|>" in text
