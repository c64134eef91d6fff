"""Messages that only who knows a secret can write: text behind a keyed hash (HMAC-SHA256) of its key and content."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable

_DIGITS = 64  # of the hash, hexadecimal


class Seal:
    """A message under one key is none under another. The secret is never printed.

    `ignored` counts the messages that nobody with the secret wrote; `report` is called at the first of them.
    """

    def __init__(self, secret: bytes, report: Callable[[], None] = lambda: None) -> None:
        self._secret, self._report = secret, report
        self.ignored = 0

    @property
    def name(self) -> str:
        """A name that follows from the secret and does not tell it."""
        return hmac.digest(self._secret, b"keys", hashlib.sha256).hex()

    def sealed(self, key: str, content: str) -> str:
        return self._hash(key, content.encode()).hex() + content

    def opened(self, key: str, message: bytes) -> str | None:
        """The content; None if nobody with the secret wrote it. Takes the same time wherever the hashes differ."""
        found, content = message[:_DIGITS], message[_DIGITS:]
        if hmac.compare_digest(found, self._hash(key, content).hex().encode()):
            return content.decode()
        self.ignored += 1
        if self.ignored == 1:
            self._report()
        return None

    def _hash(self, key: str, content: bytes) -> bytes:
        return hmac.digest(self._secret, key.encode() + b"\0" + content, hashlib.sha256)
