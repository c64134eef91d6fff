"""Run a function on several gloo ranks, forked from one process that has imported everything once.

Importing torch, deepspeed, megatron-core and the project takes 6 s of CPU per process: eight ranks that each import
them need half a minute on two cores, eight forked ones half a second. The forking process is a separate server (never
pytest), so that no thread and no process group exists when it forks.

Use: `run_ranks(function, world_size, *args)`. `function(rank, world_size, *args)` runs with the default gloo group
initialized; arguments and results travel by pickle. The first failing rank's output becomes the test's failure; a
rank that outlives the time limit is killed with all its children.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

from megatron.parallel.rank_env import without_compiler

ROOT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 10.0  # how long the other ranks may continue after one has failed

_server: subprocess.Popen[bytes] | None = None


class RankFailure(AssertionError):
    """A rank raised, was killed, or did not end in time; the message holds its output."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120,
    grace: float = GRACE_SECONDS,
    expect_failure: bool = False,
) -> list[Any]:
    """Results of `function(rank, world_size, *args)` by rank.

    `timeout` is in seconds; `grace` is how many seconds the other ranks may continue after one has failed. With
    `expect_failure`, returns an (exit code, output) pair per rank instead, and raises nothing.
    """
    global _server
    if _server is None or _server.poll() is not None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        without_compiler(environment)
        _server = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment,
        )
        atexit.register(_server.kill)
    assert _server.stdin is not None
    assert _server.stdout is not None
    file = sys.modules[function.__module__].__file__
    _send(_server.stdin, pickle.dumps((file, function.__qualname__, world_size, args, timeout, grace)))
    outcome = pickle.loads(_receive(_server.stdout))
    if expect_failure:
        return [(code, output) for code, output, _ in outcome]
    bad = [(rank, code, output) for rank, (code, output, _) in enumerate(outcome) if code != 0]
    if bad:
        text = "\n".join(f"--- rank {rank}, exit code {code}\n{output[-4000:]}" for rank, code, output in bad[:3])
        raise RankFailure(f"{len(bad)} of {world_size} ranks failed in {function.__qualname__}\n{text}")
    return [pickle.loads(result) for _, _, result in outcome]


def _send(pipe: BinaryIO, payload: bytes) -> None:
    pipe.write(struct.pack("<Q", len(payload)) + payload)
    pipe.flush()


def _receive(pipe: BinaryIO) -> bytes:
    header = pipe.read(8)
    if len(header) < 8:
        raise EOFError("the rank server ended")
    return pipe.read(struct.unpack("<Q", header)[0])


def _load_function(file: str, qualname: str) -> Callable[..., Any]:
    name = "rank_module_" + Path(file).stem
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    function: Any = module
    for part in qualname.split("."):
        function = getattr(function, part)
    return function


def _child(rank: int, world_size: int, request: tuple, folder: Path) -> None:
    file, qualname, _, args, timeout, _ = request
    os.setsid()
    log = os.open(folder / f"log{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        import torch
        import torch.distributed as dist

        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        torch.set_num_threads(1)
        torch.manual_seed(1234)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        result = _load_function(file, qualname)(rank, world_size, *args)
        (folder / f"result{rank}").write_bytes(pickle.dumps(result))
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        if code == 0:
            code = 99  # a rank function must return; exit(0) gives no result
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve_one(request: tuple) -> list[tuple[int, str, bytes]]:
    _, _, world_size, _, timeout, grace = request
    folder = Path(tempfile.mkdtemp(prefix="ranks_"))
    sys.stdout.flush()
    pids: dict[int, int] = {}
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            _child(rank, world_size, request, folder)
        pids[pid] = rank
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    while len(codes) < world_size:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in pids:
            codes[pids[pid]] = os.waitstatus_to_exitcode(status)
            if codes[pids[pid]] != 0:
                deadline = min(deadline, time.monotonic() + grace)
        elif time.monotonic() > deadline:
            break
        elif pid == 0:
            time.sleep(0.01)
    for pid, rank in pids.items():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # the rank, if it still runs, and processes that it left behind
        if rank not in codes:
            codes[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    outcome = []
    for rank in range(world_size):
        log, result = folder / f"log{rank}", folder / f"result{rank}"
        text = log.read_text(errors="replace") if log.exists() else ""
        outcome.append((codes[rank], text, result.read_bytes() if result.exists() else b""))
    shutil.rmtree(folder)
    return outcome


def _serve() -> None:
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of imports must not mix with the replies
    from megatron.common.imports import slow_imports
    from megatron.launcher.fork import preload

    with slow_imports():
        preload()
        import deepspeed
        import deepspeed.module_inject.auto_ep_layer  # an engine's start imports it
        from transformers import LlamaForCausalLM  # noqa: F401

        import megatron.engine.mcore
        import megatron.trainer.run  # noqa: F401

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # 46 s of C++ for gloo ranks that do not need it
    while True:
        try:
            request = pickle.loads(_receive(requests))
        except EOFError:
            return
        _send(replies, pickle.dumps(_serve_one(request)))


if __name__ == "__main__":
    _serve()
