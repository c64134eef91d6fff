"""A small Llama-3-like vocabulary in all three file formats, trained once per session, and its training text."""

import base64
import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron.tokenizer import Tokenizer, build_tokenizer
from megatron.tokenizer.chat import Chat, ids_and_labels
from megatron.tokenizer.conversation import Conversation, Message, TrainOn
from tests.support.made_data import LENGTHS, numbered, write

VOCAB_SIZE = 1024


def real_texts() -> list[str]:
    """Python's own documentation topics: about 80 documents, half a megabyte."""
    return [str(text) for _, text in sorted(pydoc_data.topics.topics.items())]


@pytest.fixture(scope="session")
def vocab_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    from examples.demo_tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("vocab")
    tokenizer = train_tokenizer(real_texts(), VOCAB_SIZE)
    tokenizer.save(str(folder / "tokenizer.json"))
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    by_id = sorted((i, token) for token, i in tokenizer.get_vocab(with_added_tokens=False).items())
    lines = []
    for i, token in by_id[: VOCAB_SIZE - 256]:
        lines.append(base64.b64encode(bytes(letters[c] for c in token)) + b" " + str(i).encode())
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    with (folder / "spm.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in real_texts() for line in text.splitlines() if line),
            model_writer=file,
            vocab_size=800,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=10_000,
            minloglevel=2,
            num_threads=1,
        )
    return folder


@pytest.fixture(scope="session")
def hf_tokenizer(vocab_folder: Path) -> Tokenizer:
    return build_tokenizer("HFTokenizer", vocab_folder / "tokenizer.json")


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write(tmp_path / "d", numbered(LENGTHS))


def encode_chat(
    chat: Chat, tokenizer: Tokenizer, messages: Sequence[Message], train_on: TrainOn = "all"
) -> tuple[list[int], list[int]]:
    """Ids and labels of one conversation."""
    segments = chat.segments(Conversation(messages), train_on)
    return ids_and_labels(segments, [tokenizer.encode(s.text) for s in segments if s.text is not None])


def encode_conversation(chat: Chat, tokenizer: Tokenizer, conversation: Conversation) -> tuple[list[int], list[int]]:
    """Ids and labels of one conversation, including the tools and template arguments of its record."""
    segments = chat.segments(conversation, "all")
    return ids_and_labels(segments, [tokenizer.encode(s.text) for s in segments if s.text is not None])
