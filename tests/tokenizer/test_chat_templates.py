"""Chat templates are rendered byte for byte as by `transformers`, and refused where it refuses them."""

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest

from megatron.tokenizer import Tokenizer, chat_template
from megatron.tokenizer.chat_template import TEMPLATE_FOLDER, ChatTemplate, load_chat_template, shipped_templates
from megatron.tokenizer.conversation import ChatError
from tests.support.chat_templates import NAMED, SINGLE, SPECIAL, transformers_tokenizer
from tests.support.conversations import random_records

pytestmark = pytest.mark.unit

COUNT = 300
TEMPLATES: dict[str, str | dict[str, str]] = {
    **{name: (TEMPLATE_FOLDER / f"{name}.jinja").read_text() for name in shipped_templates()},
    **SINGLE,
    "named": NAMED,
}


def test_all_templates_are_compared() -> None:
    assert {"llama3", "llama3.1", "llama3.2", "llama3.3"} == set(shipped_templates())
    assert len(TEMPLATES) - len(shipped_templates()) >= 10


def compare(name: str, vocab_folder: Path) -> tuple[int, int, int]:
    """Numbers of random conversations: (rendered by both to the same bytes, refused by both, differing)."""
    theirs = transformers_tokenizer(vocab_folder, TEMPLATES[name])
    ours = ChatTemplate(TEMPLATES[name], SPECIAL)
    same = refused = different = 0
    for number, record in enumerate(random_records(COUNT)):
        prompt = number % 3 == 0
        arguments = record.get("chat_template_kwargs", {})
        tools, documents = record.get("tools"), record.get("documents")
        expected: str | None
        try:
            expected = theirs.apply_chat_template(
                record["messages"],
                tools=tools,
                documents=documents,
                tokenize=False,
                add_generation_prompt=prompt,
                **arguments,
            )
        except Exception:
            expected = None
        found: str | None
        try:
            found = ours.render(record["messages"], tools, documents, prompt=prompt, arguments=arguments)
        except ChatError:
            found = None
        different += found != expected
        same += found == expected is not None
        refused += found is expected is None
    return same, refused, different


@pytest.mark.parametrize("name", TEMPLATES)
def test_equal_to_transformers(name: str, vocab_folder: Path) -> None:
    same, refused, different = compare(name, vocab_folder)
    assert different == 0
    assert same + refused == COUNT
    assert same > COUNT / 8
    assert refused > 0 or name in ("tools", "macros", "parts", "white space", "documents", "reasoning")


MUTATIONS: dict[str, tuple[str, Any, str]] = {
    "escaped letters": ("_tojson", lambda value, **_: json.dumps(value), "tools"),
    "null fields stay": ("_as_seen", dict, "parts"),
    "one name for reasoning": ("_REASONING", ("reasoning_content",), "reasoning"),
    "any namespace": ("_refuse_private", lambda name: None, "sandbox"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_sees_another_environment(
    mutation: str, vocab_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attribute, value, name = MUTATIONS[mutation]
    monkeypatch.setattr(chat_template, attribute, value)
    assert compare(name, vocab_folder)[2] > 0


def test_non_conversations_are_refused(vocab_folder: Path) -> None:
    theirs = transformers_tokenizer(vocab_folder, SINGLE["tools"])
    ours = ChatTemplate(SINGLE["tools"], SPECIAL)
    good = [{"role": "user", "content": "x"}]
    for messages, tools, documents in (
        ([], None, None),
        (["x"], None, None),
        (good, ["x"], None),
        (good, None, ["x"]),
        (good, [{}], None),
    ):
        with pytest.raises((TypeError, ValueError, AttributeError, jinja2.TemplateError)):
            theirs.apply_chat_template(messages, tools=tools, documents=documents, tokenize=False)
        with pytest.raises(ChatError):
            ours.render(messages, tools, documents)
    for source in ("{% for %}", "{{ x | nofilter }}", "{% include 'x' %}" * 2, "{% unknown %}"):
        with pytest.raises(ChatError):
            ChatTemplate(source, SPECIAL).render(good)


def write_folder(folder: Path, way: str) -> None:
    """A model folder with its templates where `transformers` looks for them."""
    config: dict[str, Any] = {
        **SPECIAL,
        "pad_token": {"__type": "AddedToken", "content": SPECIAL["pad_token"], "special": True},
    }
    if way == "config":
        config["chat_template"] = SINGLE["tools"]
    elif way == "config with names":
        config["chat_template"] = [{"name": name, "template": text} for name, text in NAMED.items()]
    else:
        config["chat_template"] = "an entry that a file wins over"
        (folder / "chat_template.jinja").write_text(SINGLE["white space"])
    if way == "files":
        (folder / "additional_chat_templates").mkdir()
        for name, text in NAMED.items():
            if name != "default":
                (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("way", ["config", "config with names", "file", "files"])
def test_the_template_of_a_model_folder(way: str, vocab_folder: Path, hf_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((vocab_folder / "tokenizer.json").read_bytes())
    write_folder(tmp_path, way)
    theirs = type(transformers_tokenizer(vocab_folder, "")).from_pretrained(tmp_path)
    ours = load_chat_template(str(tmp_path), hf_tokenizer)
    assert ours.special_tokens == theirs.special_tokens_map
    compared = 0
    for record in random_records(60, seed=1):
        try:
            expected = theirs.apply_chat_template(record["messages"], tools=record.get("tools"), tokenize=False)
        except Exception:
            continue
        assert ours.render(record["messages"], record.get("tools")) == expected
        compared += 1
    assert compared > 15


def test_loading_refuses(hf_tokenizer: Tokenizer, tmp_path: Path) -> None:
    latin, broken, empty, odd = (tmp_path / name for name in ("latin.jinja", "broken.json", "empty.json", "odd.json"))
    latin.write_bytes("{{ 'é' }}".encode("latin-1"))
    broken.write_text('{"chat_template": ')
    empty.write_text("{}")
    odd.write_text('{"chat_template": [1]}')
    for path, message in (
        (tmp_path / "absent", "no such file"),
        (latin, "not UTF-8"),
        (broken, "not JSON"),
        (empty, "no chat_template"),
        (odd, "neither a text nor a list"),
        (tmp_path / "folder", "no chat_template"),
    ):
        if path.name == "folder":
            path.mkdir()
        with pytest.raises(ChatError, match=message):
            load_chat_template(str(path), hf_tokenizer)
    unnamed = ChatTemplate({"a": "x", "b": "y"}, SPECIAL)
    with pytest.raises(ChatError, match="none of them is called default: a, b"):
        unnamed.render([{"role": "user", "content": "x"}])
