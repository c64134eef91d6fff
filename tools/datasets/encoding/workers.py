"""Applying a function to a stream of items on all cores; results keep the order of the items."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from megatron.common.processes import die_with_parent
from megatron.data.indexed import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

_work: Callable[[Any], Any] | None = None  # set before forking, and inherited by the workers


def in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Generator[Result, None, None]:
    """Apply `work` to every item in `workers` processes. A few items per worker are in flight, which bounds memory.

    `work` and its state are inherited by fork, never pickled. Raises the exceptions of `work`, and DataError if a
    worker is killed.
    """
    global _work
    if workers < 1:
        raise DataError(f"--workers {workers}: at least one is needed")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core; threads inside them would only compete
    _work = work
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(os.getpid(),)) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(_do, item))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise DataError("a worker process was killed, probably for memory; use fewer --workers") from error
        finally:
            with contextlib.suppress(Exception):
                pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(parent: int) -> None:
    """Leave Ctrl-C to the parent, and die with it, because an orphaned worker would wait forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent, signal.SIGKILL)


def _do(item: Any) -> Any:
    assert _work is not None
    return _work(item)
