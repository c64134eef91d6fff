"""A key-value store between the ranks that accepts only their own messages.

torch's TCPStore answers anyone who connects. On one machine this one listens only on the loopback interface. In all
cases each value carries a keyed hash (HMAC-SHA256) of its key and content under a secret of the run, which rank 0 draws
and the process group distributes: it is in no file, no environment and no command line. Values that do not verify are
ignored and counted. The names of the keys also contain the secret, so that nobody can guess which to overwrite.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Self, cast

from torch.distributed import PrefixStore, TCPStore

from megatron.common.sealing import Seal
from megatron.parallel.collective_errors import RankGroup
from megatron.parallel.loopback import LOOPBACK, serve_on_loopback
from megatron.parallel.place import Place

CONNECT_SECONDS = 60
_SECRET_BYTES = 32


@dataclass(frozen=True, repr=False)
class StoreAddress:
    """Where rank 0 serves, and the run's secret; it is never printed."""

    host: str
    port: int
    secret: bytes


class AuthenticatedStore:
    """The ranks' store. `ignored` counts values from outside this run; `report` gets a message for the first."""

    def __init__(self, store: TCPStore, secret: bytes, report: Callable[[str], None] = lambda line: None) -> None:
        line = "a message from outside this run was ignored; somebody else writes to its status store"
        self._seal = Seal(secret, lambda: report(line))
        self._store = PrefixStore(self._seal.name, store)

    @property
    def ignored(self) -> int:
        return self._seal.ignored

    @classmethod
    def open(cls, place: Place, host: str | None, report: Callable[[str], None] = lambda line: None) -> Self:
        """Serve on rank 0, connect on the others. Collective over the default group.

        `host` is rank 0's address for ranks of other nodes; None: all are on this machine.
        """
        address: StoreAddress | None = None
        store: TCPStore | None = None
        if place.rank == 0:
            store = serve_on_loopback() if host is None else serve_everywhere()
            address = StoreAddress(host or LOOPBACK, store.port, secrets.token_bytes(_SECRET_BYTES))
        address = RankGroup.world(place.device).broadcast(address)
        assert address is not None
        if store is None:
            timeout = timedelta(seconds=CONNECT_SECONDS)
            store = TCPStore(address.host, address.port, wait_for_workers=False, timeout=timeout)
        return cls(store, address.secret, report)

    def set(self, key: str, value: str) -> None:
        self._store.set(key, self._seal.sealed(key, value))

    def get(self, keys: Sequence[str]) -> list[str | None]:
        """The values of some keys, which must exist; None for those that are not this run's."""
        found = self._store.multi_get(list(keys))
        return [self._seal.opened(key, value) for key, value in zip(keys, found, strict=True)]

    def has(self, key: str) -> bool:
        return bool(self._store.check([key]))

    def set_first(self, key: str, value: str) -> bool:
        """Set a key unless another rank has set it already; returns whether this value is the first. Foreign values do
        not count."""
        sealed, expected = self._seal.sealed(key, value), ""
        for _ in range(10):
            present = self._store.compare_set(key, expected, sealed)
            if present == sealed.encode():
                return True
            if self._seal.opened(key, present) is not None:
                return False
            expected = cast(str, present)  # arbitrary bytes; the store takes them as they are
        return False


def serve_everywhere() -> TCPStore:
    """A store on a free port of all interfaces."""
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
