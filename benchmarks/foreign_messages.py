"""Hostile messages for the ports of a run: arbitrary bytes, malformed requests to torch's store, forged values in it.

Nobody outside the run has its secret. The forger here knows everything else: the names of the keys, which torch's
store lists for any client, and their values.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from datetime import timedelta

VERDICT = '{"why": "a foreign verdict", "lost": [0], "by": 1, "own_error": false}'
HASH = 64  # hexadecimal digits in front of every value
_OPENING = b"\x00" + struct.pack("<I", 0x3C85F7CE)  # how a connection to torch's store begins
_NONCE = b"ping"
RAW = [
    b"\x00" * 4096,
    VERDICT.encode() + b"\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"not JSON\n",
    os.urandom(4096),
    # torch's store: a value that is never sent, a value of 32 TiB, an impossible number of keys
    _OPENING + b"\x01" + struct.pack("<Q", 30) + b"abc",
    _OPENING + b"\x01" + struct.pack("<Q", 1) + b"k" + struct.pack("<Q", 1 << 45),
    _OPENING + b"\x0a" + struct.pack("<Q", 1 << 50),
]


def send_raw(port: int) -> int:
    """Send every message of RAW to a port of this machine; returns how many were sent."""
    sent = 0
    for message in RAW:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 2) as connection:
            connection.sendall(message)
            sent += 1
            time.sleep(0.05)
    return sent


def is_store(port: int) -> bool:
    """Whether a store of torch's answers on a port of this machine."""
    try:
        with socket.create_connection(("127.0.0.1", port), 2) as connection:
            connection.settimeout(0.5)
            connection.sendall(_OPENING + b"\x0d" + _NONCE)
            return connection.recv(4) == _NONCE
    except OSError:
        return False


def forged(key: str, value: bytes, others: list[bytes]) -> Iterator[bytes]:
    """Well-formed messages, none of them from the run, to replace the `value` of a key: without the hash, hashed with
    another secret, truncated, modified, taken from another key."""
    content = value[HASH:]
    yield content
    secret = b"x" * 32
    yield hmac.digest(secret, key.encode() + b"\0" + content, hashlib.sha256).hex().encode() + content
    yield hashlib.sha256(content).hexdigest().encode() + content
    for length in (0, 10, HASH, HASH + 1, len(value) - 1):
        yield value[:length]
    yield value[:HASH] + content.replace(b"0", b"9")
    yield b"0" * HASH + VERDICT.encode()
    yield from others


def forge(port: int) -> int:
    """Replace each heartbeat in a run's store by every forged message in turn and by an old heartbeat of the run, and
    its verdict by a forged one; returns how many were written, 0 if the store holds no heartbeats."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", port, wait_for_workers=False, timeout=timedelta(seconds=3))
    beats = sorted(key for key in store.list_keys() if "/beat/" in key)
    old = {key: store.get(key) for key in beats}
    written = 0
    for key in beats:
        name = "beat/" + key.rpartition("/")[2]
        for message in forged(name, old[key], [old[other] for other in beats if other != key]):
            store.set(key, message.decode())
            written += 1
            time.sleep(0.1)  # the run reads and writes in between
        store.set(key, old[key].decode())  # replayed
        store.set(key.rpartition("beat/")[0] + "verdict", "0" * HASH + VERDICT)
        written += 2
    return written


if __name__ == "__main__":
    print(sum(forge(int(port)) for port in sys.argv[1:]))
