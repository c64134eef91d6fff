"""Interactive generation on the terminal: single prompts, or a conversation.

Rank 0 reads and writes. While the user types it sends the other ranks short broadcasts, so that no collective times
out, however long the user takes.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from typing import TextIO

from megatron.common.errors import UserError
from megatron.generation.generate import Generator, why_not
from megatron.generation.requests import PromptReader
from megatron.generation.sampling import RandomNumbers, Sampling
from megatron.generation.sequences import Continuation, Endings, TextStream
from megatron.parallel.collective_errors import RankGroup
from megatron.parallel.rank_env import TYPED
from megatron.supervision.status_store import Whereabouts
from megatron.tokenizer.conversation import THINK_BEGIN, THINK_END, Conversation, Message

STOP = "stop"  # as in GPT-NeoX
IDLE_SECONDS = 5.0  # between two broadcasts while nothing is typed
_CHAT_HELP = "/exit ends, /reset begins a new conversation"


class Dialogue:
    """An interactive run. Collective over all ranks."""

    def __init__(
        self,
        generator: Generator,
        reader: PromptReader,
        sampling: Sampling,
        endings: Endings,
        whereabouts: Whereabouts,
    ) -> None:
        self.generator, self.args, self.reader = generator, generator.args, reader
        self.sampling, self.endings, self.whereabouts = sampling, endings, whereabouts
        self.ranks = RankGroup.world(generator.place.device, UserError)
        self.messages: list[Message] = []  # of the conversation so far
        self._asked = False  # the input prompt is on the screen
        self._typed = _lines() if self.ranks.rank == 0 else None

    def hold(self) -> None:
        """Answer each line, until the input ends or the user ends it."""
        number = 0
        while (prompt := self._next_prompt()) is not None:
            random = RandomNumbers(self.args.seed, number, 0) if self.args.temperature else None
            trace = bool(self.args.thinking)
            sequence = Continuation(number, 0, prompt, self.args.maximum_tokens, random, trace=trace)
            self._answer(sequence)
            number += 1

    def _answer(self, sequence: Continuation) -> None:
        screen = _Screen(self.endings, sequence.trace, self.args.show_thinking) if self.ranks.rank == 0 else None
        start = time.perf_counter()
        self.generator.run(
            self.generator.own_share([sequence]),
            self.sampling,
            self.endings,
            on_tokens=None if screen is None else lambda _, new: screen.add(new),
        )
        if screen is None:
            return
        screen.finish(sequence, time.perf_counter() - start)
        _, text = self.endings.split(sequence)
        if self.args.chat:
            self.messages.append(Message("assistant", text.strip()))

    def _next_prompt(self) -> list[int] | None:
        """Token ids of the next prompt, None at the end; the same on all ranks. Collective."""
        while True:
            self.whereabouts.at("waiting for input")
            found = self.ranks.broadcast(self._typed_prompt() if self._typed is not None else "idle")
            if found != "idle":
                assert not isinstance(found, str)
                return found

    def _typed_prompt(self) -> list[int] | str | None:
        """On rank 0: token ids of the typed prompt; None at the end; "idle" without a prompt that can be continued."""
        assert self._typed is not None
        if not self._asked:
            print("> " if self.args.chat else f"prompt ({STOP} ends): ", end="", file=sys.stderr, flush=True)
            self._asked = True
        try:
            line = self._typed.get(timeout=IDLE_SECONDS)
        except queue.Empty:
            return "idle"
        self._asked = False
        word = "" if line is None else line.strip()
        if line is None or word.lower() == ("/exit" if self.args.chat else STOP):
            return None
        if self.args.chat and word.startswith("/"):
            if word == "/reset":
                self.messages.clear()
            _say("a new conversation" if word == "/reset" else f"{word} is not a command: {_CHAT_HELP}")
            return "idle"
        if not word:
            return "idle"
        turn = Message("user", line)
        try:
            ids = self.reader.ids(Conversation([*self.messages, turn]))
            reason = why_not(ids, self.args)
        except UserError as error:
            reason = str(error)
        if reason is not None:
            _say(f"not continued: {reason}" + (f"; {_CHAT_HELP}" if self.args.chat else ""))
            return "idle"
        if self.args.chat:
            self.messages.append(turn)
        return ids


class _Screen:
    """Streams a text to the terminal as its tokens arrive."""

    def __init__(self, endings: Endings, trace: bool, show_thinking: bool) -> None:
        assert endings.decode is not None
        self._stream = TextStream(endings.decode, endings.strings, trace)
        self._show_thinking, self._in_trace = show_thinking, trace
        if trace:
            self._write(THINK_BEGIN if show_thinking else "(thinking)\n")

    def add(self, new: list[int]) -> None:
        self._show(*self._stream.add(new))

    def finish(self, sequence: Continuation, seconds: float) -> None:
        self._show(*self._stream.finish())
        self._write("\n")
        if sequence.trace and not sequence.closed:
            _say(f"the trace has no {THINK_END}: there is no answer")
        tokens = len(sequence.new)
        _say(f"({tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s, ended by {sequence.end})")

    def _show(self, thoughts: str, answer: str) -> None:
        if self._show_thinking:
            self._write(thoughts)
        if answer and self._in_trace:
            self._in_trace = False
            if self._show_thinking:
                self._write(THINK_END)
        self._write(answer)

    def _write(self, text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _lines() -> queue.Queue[str | None]:
    """A queue of typed lines, ended by None; a daemon thread fills it."""
    lines: queue.Queue[str | None] = queue.Queue(maxsize=1)
    source = open(int(os.environ.get(TYPED, "0")), encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    threading.Thread(target=_read, args=(source, lines), daemon=True).start()
    return lines


def _read(source: TextIO, lines: queue.Queue[str | None]) -> None:
    for line in source:
        lines.put(line.rstrip("\n"))
    lines.put(None)
