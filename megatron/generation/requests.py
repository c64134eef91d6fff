"""Reads prompts from a file, one per line, as token ids: plain text, or JSON if the file's name ends in .jsonl.

A line that cannot be continued does not stop the others: it becomes a request with an error, which is reported in the
output file and at the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.common.errors import UserError
from megatron.generation.conversations import ChatPrompts, read_request
from megatron.generation.generate import why_not
from megatron.neox_arguments import NeoXArgs
from megatron.tokenizer import Tokenizer
from megatron.tokenizer.conversation import Conversation, Message

_PROMPT, _MESSAGES = "prompt", "messages"


@dataclass(frozen=True)
class Request:
    """A prompt of a run: its number from 0, its line in the file, its token ids; or `error`, if it cannot be continued.

    `context` is the text, or the last turn of a conversation; `fields` are the other fields of a JSON record.
    """

    number: int
    line: int
    context: str
    ids: list[int] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


class PromptReader:
    """Turns user input into requests."""

    def __init__(self, args: NeoXArgs, tokenizer: Tokenizer, chat: ChatPrompts | None) -> None:
        self.args, self._tokenizer, self._chat = args, tokenizer, chat

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a plain prompt, after the begin-of-text token if the vocabulary has one.

        Without one (GPT-2), an empty prompt is the end-of-document token, as in GPT-NeoX.
        """
        beginning = [] if self._tokenizer.bos is None else [self._tokenizer.bos]
        return beginning + self._tokenizer.encode(text) or [self._tokenizer.eod]

    def ids(self, conversation: Conversation) -> list[int]:
        """Token ids of a conversation; without a chat format, its only turn is a plain prompt."""
        if self._chat is None:
            return self.text_ids(conversation.messages[0].content)
        return self._chat.ids(conversation)

    def unconditional(self) -> list[Request]:
        """One empty prompt."""
        return [Request(0, 1, "", self.text_ids(""))]

    def file(self, path: Path) -> list[Request]:
        """Requests for all non-blank lines of a file. Raises UserError if it cannot be read or has no prompt."""
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise UserError(
                f"sample_input_file {path}: {error.strerror}; give a text file with one prompt per line"
            ) from None
        read = self._json_line if path.suffix == ".jsonl" else self._text_line
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        if not numbered:
            raise UserError(f"sample_input_file {path} has no prompt; write one per line")
        return [self._request(index, number, line, read) for index, (number, line) in enumerate(numbered)]

    def _request(
        self, index: int, number: int, line: bytes, read: Callable[[str], tuple[str, Conversation, dict[str, Any]]]
    ) -> Request:
        context, fields = line.decode(errors="replace").rstrip("\r"), dict[str, Any]()
        try:
            context, conversation, fields = read(line.decode().rstrip("\r"))
            ids = self.ids(conversation)
            error = why_not(ids, self.args)
        except UnicodeDecodeError as problem:
            error = f"not UTF-8 text ({problem.reason} at byte {problem.start})"
        except UserError as problem:
            error = str(problem)
        if error is not None:
            return Request(index, number, context, [], fields, f"line {number}: {error}")
        return Request(index, number, context, ids, fields)

    def _text_line(self, line: str) -> tuple[str, Conversation, dict[str, Any]]:
        return line, Conversation([Message("user", line)]), {}

    def _json_line(self, line: str) -> tuple[str, Conversation, dict[str, Any]]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"not JSON ({error})") from None
        if isinstance(record, str):
            record = {_PROMPT: record}
        if not isinstance(record, dict) or len({_PROMPT, _MESSAGES} & record.keys()) != 1:
            raise UserError('expected a text, {"prompt": ...} or, with chat, {"messages": [...]}')
        fields = {name: value for name, value in record.items() if name not in (_PROMPT, _MESSAGES)}
        if _PROMPT in record:
            prompt = record[_PROMPT]
            if not isinstance(prompt, str):
                raise UserError(f"prompt is of type {type(prompt).__name__}; expected a text")
            if self._chat is None:
                return prompt, Conversation([Message("user", prompt)]), fields
            return prompt, read_request([{"role": "user", "content": prompt}], fields), fields
        if self._chat is None:
            raise UserError("messages without chat: add chat: true, which writes them in the model's format")
        conversation = read_request(record[_MESSAGES], fields)
        return conversation.messages[-1].content, conversation, fields
