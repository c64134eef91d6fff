"""Messages that only holders of a secret can write: text behind a keyed hash (HMAC-SHA256) of its key and content."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable

_DIGITS = 64  # of the hash, hexadecimal


class Seal:
    """Seals and opens messages; a message is valid only under its own key. The secret is never printed.

    `ignored` counts the messages that were written without the secret; `report` is called for the first of them.
    """

    def __init__(self, secret: bytes, report: Callable[[], None] = lambda: None) -> None:
        self._secret, self._report = secret, report
        self.ignored = 0

    @property
    def name(self) -> str:
        """A name derived from the secret, which it does not reveal."""
        return hmac.digest(self._secret, b"keys", hashlib.sha256).hex()

    def sealed(self, key: str, content: str) -> str:
        return self._hash(key, content.encode()).hex() + content

    def opened(self, key: str, message: bytes) -> str | None:
        """The content; None if it was written without the secret. The hashes are compared in constant time."""
        found, content = message[:_DIGITS], message[_DIGITS:]
        if hmac.compare_digest(found, self._hash(key, content).hex().encode()):
            return content.decode()
        self.ignored += 1
        if self.ignored == 1:
            self._report()
        return None

    def _hash(self, key: str, content: bytes) -> bytes:
        return hmac.digest(self._secret, key.encode() + b"\0" + content, hashlib.sha256)
