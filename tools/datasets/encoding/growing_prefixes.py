"""Encoding conversations like GPT-NeoX's `preprocess_data_with_chat_template.py`: by prefixes that grow turn by turn.

The chat template is applied to the first turn, the first two, and so on; the ids that a turn adds belong to it. If the
next turn is the model's, its header belongs to the preceding turn, and is not learned. The tokenizer's end token comes
last, and is learned if the last turn is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from megatron.common.errors import UserError
from megatron.common.labels import IGNORE_INDEX


class ChatFileError(UserError, ValueError):
    """A tokenizer folder, template or conversation that cannot be used."""


class PrefixChat:
    """The tokenizer and chat template of a Hugging Face folder: tokenizer.json and tokenizer_config.json."""

    def __init__(self, folder: Path) -> None:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        config = _read_json(folder / "tokenizer_config.json")
        template = config.get("chat_template")
        beside = folder / "chat_template.jinja"  # location since transformers 5
        if template is None and beside.is_file():
            template = beside.read_text(encoding="utf-8")
        if not isinstance(template, str):
            raise ChatFileError(f"{folder}: no chat_template in tokenizer_config.json and no chat_template.jinja")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception for any problem with the file
            raise ChatFileError(f"{folder / 'tokenizer.json'}: not a Hugging Face tokenizer.json ({error})") from None
        self._names = {name: _token(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        eos = self._names["eos_token"]
        self.eos = None if eos is None else self._tokenizer.token_to_id(eos)
        added = self._tokenizer.get_added_tokens_decoder().values()
        self.special = sorted(token.content for token in added if token.special)
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(template)
        except jinja2.TemplateError as error:
            raise ChatFileError(f"{folder}: the chat template is not valid Jinja: {error}") from None

    def encode(self, turns: Sequence[Mapping[str, Any]], prompt: bool = False) -> list[int]:
        """Ids of the template's text for `turns`; names of special tokens in it become these tokens."""
        import jinja2

        names = {name: value for name, value in self._names.items() if value is not None}
        try:
            text = self._template.render(messages=list(turns), add_generation_prompt=prompt, **names)
        except (jinja2.TemplateError, TypeError) as error:
            raise ChatFileError(f"the chat template refuses the conversation: {error}") from None
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def ids_and_labels(
        self, turns: Any, generation_role: str = "assistant", only_last: bool = False, mask: bool = True
    ) -> tuple[list[int], list[int]]:
        """Ids of a conversation and their labels, -100 for tokens that are not learned; without `mask` all are learned.

        ChatFileError if `turns` is not a conversation, quotes a special token, or if the template rewrites turns.
        """
        self._check(turns)
        ids: list[int] = []
        labels: list[int] = []
        for place, turn in enumerate(turns):
            last = place == len(turns) - 1
            called_for = not last and turns[place + 1]["role"] == generation_role
            prefix = self.encode(turns[: place + 1], prompt=called_for)
            if prefix[: len(ids)] != ids:
                raise ChatFileError(f"turn {place + 1}: the chat template rewrites earlier turns")
            added = prefix[len(ids) :]
            learned = not mask or (turn["role"] == generation_role and (last or not only_last))
            ids += added
            labels += added if learned else [IGNORE_INDEX] * len(added)
        if self.eos is not None and mask:
            labels.append(self.eos if labels[-1] != IGNORE_INDEX else IGNORE_INDEX)
            ids.append(self.eos)
        return ids, labels

    def _check(self, turns: Any) -> None:
        if not isinstance(turns, list) or not turns:
            raise ChatFileError(f"expected a list of turns with role and content, found {type(turns).__name__}")
        for place, turn in enumerate(turns, 1):
            if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or "content" not in turn:
                raise ChatFileError(f"turn {place}: expected an object with role and content")
            content = turn["content"]
            quoted = next((name for name in self.special if isinstance(content, str) and name in content), None)
            if quoted is not None:
                raise ChatFileError(f"turn {place} quotes {quoted}, which would become the token itself")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ChatFileError(f"{path}: {error.strerror}; give the folder of a Hugging Face tokenizer") from None
    except ValueError as error:
        raise ChatFileError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ChatFileError(f"{path}: expected a JSON object")
    return content


def _token(value: Any) -> str | None:
    """A token's name, written as text or as an object with `content`."""
    return value.get("content") if isinstance(value, dict) else value


def _raise(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
