"""The data commands either process damaged input or stop with one message and exit code 2."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.tokenizer import Tokenizer
from megatron.tokenizer.chat_template import ChatTemplate
from megatron.tokenizer.conversation import ChatError
from megatron.tokenizer.template_chat import TemplateChat
from tests.support.chat_templates import SINGLE
from tests.support.conversations import conversations, random_records
from tests.support.data_commands import clean, preprocess, preprocess_chats
from tests.support.text_files import write_records, write_texts
from tools.datasets.encoding.conversations import read_conversation
from tools.datasets.inspect_data import main as inspect

pytestmark = pytest.mark.unit

ODD: list[Any] = [None, True, 0, -1, 1.5, "", "x", "[", '{"a": 1}', [], [[]], {}, {"role": "user"}, ["user"], "\ud800"]
KEYS = [
    *("role", "from", "content", "value", "text", "weight", "train", "tool_calls", "function_call", "function", "name"),
    *("arguments", "reasoning", "thinking", "system", "tools", "documents", "chat_template_kwargs", "history", "mask"),
    *("instruction", "input", "output", "prompt", "completion", "question", "answer", "data", "label", "messages"),
]


def mutated(value: Any, chance: random.Random) -> Any:
    """A record with a part changed, removed, added or repeated."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        action = chance.random()
        if action < 0.2:
            return {name: item for name, item in value.items() if name != key}
        if action < 0.4:
            return {**value, chance.choice(KEYS): chance.choice([*ODD, value[key]])}
        return {**value, key: mutated(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.9:
        place = chance.randrange(len(value))
        if chance.random() < 0.2:
            return [*value[:place], value[place], *value[place:]]
        return [*value[:place], mutated(value[place], chance), *value[place + 1 :]]
    return chance.choice(ODD)


def records(chance: random.Random) -> list[Any]:
    plain: list[Any] = [
        *random_records(40, seed=chance.randrange(1000)),
        *({"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]} for _ in range(10)),
        *({"input": [{"role": "user", "content": "x"}], "output": "y", "reasoning": "on"} for _ in range(10)),
        *({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]} for _ in range(10)),
    ]
    for _ in range(3):
        plain = [mutated(record, chance) if chance.random() < 0.8 else record for record in plain]
    return plain


def test_records_are_read_or_refused(hf_tokenizer: Tokenizer) -> None:
    chance = random.Random(3)
    chat = TemplateChat(ChatTemplate(SINGLE["tools"], {"bos_token": "", "eos_token": "<|eot_id|>"}), hf_tokenizer)
    good, reasons, rules = 0, [], set()
    for _ in range(12):
        for record in records(chance):
            if isinstance(record, dict):
                try:
                    chat.segments(read_conversation(record, chance.random() < 0.5).conversation, "all")
                    good += 1
                except ChatError as error:
                    reasons.append(str(error))
                    rules.add(error.rule)
    assert good > 50
    assert len(reasons) > 50
    assert all(reasons)
    assert len(rules) < 60  # few enough for a table


def test_templates_are_followed_or_refused(hf_tokenizer: Tokenizer) -> None:
    chance = random.Random(4)
    conversation = read_conversation(conversations(1, "stars")[0]).conversation
    sources = list(SINGLE.values())
    reasons = []
    for _ in range(150):
        text = chance.choice(sources)
        start, end = sorted(chance.choices(range(len(text)), k=2))
        text = chance.choice([text[:start] + text[end:], text[:start] + chance.choice(sources)[start:end] + text[end:]])
        try:
            TemplateChat(ChatTemplate(text, {}), hf_tokenizer).segments(conversation, "all")
        except ChatError as error:
            reasons.append(str(error))
    assert len(reasons) > 100
    assert all(reasons)


def test_commands_end_with_one_message(vocab_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(5)
    (tmp_path / "out").mkdir()
    source = tmp_path / "in.jsonl"
    good = [{**record, "text": "some words " * 9} for record in conversations(20, "stars")]
    commands: dict[str, Callable[..., int]] = {
        "preprocess_data.py": lambda **o: preprocess(vocab_folder, tmp_path / "out/a", source, **o),
        "preprocess_sft.py": lambda **o: preprocess_chats(vocab_folder, tmp_path / "out/b", f"a={source}", **o),
        "clean_corpus.py": lambda **o: clean(tmp_path / "out/c.jsonl", source, **o),
    }
    for round_ in range(4):
        write_records(source, [mutated(record, chance) if chance.random() < 0.3 else record for record in good])
        content = bytearray(source.read_bytes())
        for _ in range(round_ * 3):
            content[chance.randrange(len(content))] = chance.randrange(256)
        source.write_bytes(content[: chance.choice([len(content), len(content) // 2])])
        for name, command in commands.items():
            for policy in ("fatal", "skip"):
                code = command(on_bad_record=policy)
                error = capsys.readouterr().err
                assert code in (0, 2)
                assert code == 0 or error.splitlines()[-1].startswith(f"{name}: ")


def test_files_beside_data_are_read_or_refused(
    vocab_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(6)
    assert preprocess(vocab_folder, tmp_path / "c", write_texts(tmp_path / "c.jsonl", ["some words"] * 9)) == 0
    prefix = tmp_path / "c_text_document"
    refused = 0
    for ending in ("idx", "json"):
        path = Path(f"{prefix}.{ending}")
        original = path.read_bytes()
        for _ in range(60):
            content = bytearray(original)
            if ending == "json" and chance.random() < 0.5:
                content = bytearray(json.dumps(mutated(json.loads(original), chance)).encode())
            for _ in range(chance.randint(0, 3)):
                content[chance.randrange(len(content))] = chance.randrange(256)
            path.write_bytes(content[: chance.choice([len(content), chance.randrange(len(content) + 1)])])
            code = inspect([str(prefix), "--vocab-file", str(vocab_folder), "--max-chars", "50", "--seq-length", "8"])
            assert code in (0, 2)
            refused += code == 2
        path.write_bytes(original)
    capsys.readouterr()
    assert refused > 60
