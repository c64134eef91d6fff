"""Small real runs on CPU ranks for `faults.py` to inject faults into, and their observed outcomes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.foreign_messages import is_store, send_raw
from examples.llama_keys import LLAMA
from megatron.checkpoint.manifest import file_checksum, read_manifest, write_manifest
from megatron.checkpoint.state_ranges import BLOCK, ITEM
from megatron.common.processes import children
from megatron.data.indexed import IndexedWriter

ROOT = Path(__file__).resolve().parent.parent
VOCAB, SEQ = 576, 16
BOUND_SECONDS = 120.0
MODEL: dict[str, Any] = {
    **LLAMA,
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "make_vocab_size_divisible_by": 1,
    "no_weight_tying": True,
    "max_position_embeddings": 64,
    "rms_norm_epsilon": 1e-5,
    "rotary_emb_base": 10000,
}
RUN: dict[str, Any] = {
    "seq_length": SEQ,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8}},
    "lr_decay_style": "constant",
    "precision": "fp32",
    "distributed_backend": "gloo",
    "from_scratch": True,
    "model_parallel_size": 2,
    "pipe_parallel_size": 2,
    "log_interval": 1,
    "checkpoint_factor": 4,
    "train_iters": 12,
    "heartbeat_timeout_seconds": 3.0,
    "kernels": "reference",
}
ENGINES: dict[str, dict[str, Any]] = {
    "deepspeed": {},
    "megatron": {"engine": "megatron", "num_layers": 4, "virtual_pipe_parallel_size": 2},
}


@dataclass
class Observed:
    """How a run ended. `lost` is the number of iterations that its restart has to repeat."""

    code: int
    last_line: str
    output: str
    seconds: float
    lost: str = "none"


@dataclass
class Workplace:
    """A folder with data, tokenizers, a configuration and the checkpoints of a finished run."""

    folder: Path
    keys: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def make(cls, folder: Path, engine: str) -> Workplace:
        from examples.demo_tokenizer import train_tokenizer

        folder.mkdir(parents=True)
        for name, seed in (("data", 0), ("other", 1)):
            write_tokens(folder / name, seed)
        words = ["the galaxy turns slowly " * 60, "a star is born in dust and gas " * 60]
        for name, texts in (("tokenizer", words), ("tokenizer2", ["quite other words for merging pairs " * 90])):
            train_tokenizer(texts, VOCAB - 48).save(str(folder / f"{name}.json"))
        keys = {
            "train_data_paths": [str(folder / "data")],
            "vocab_file": str(folder / "tokenizer.json"),
            "save": str(folder / "checkpoints"),
            "log_dir": str(folder / "log"),
        }
        return cls(folder, MODEL | RUN | keys | ENGINES[engine])

    def copy(self, name: str) -> Workplace:
        """A copy in another folder, with adapted paths."""
        target = self.folder.with_name(name)
        shutil.copytree(self.folder, target, ignore=shutil.ignore_patterns("log"))
        text = json.dumps(self.keys).replace(str(self.folder), str(target))
        return Workplace(target, json.loads(text))

    def command(self, *words: str) -> list[str]:
        path = self.folder / "run.yml"
        path.write_text(yaml.safe_dump(self.keys))
        return [sys.executable, str(ROOT / "deepy.py"), str(ROOT / "train.py"), str(path), *words]

    @property
    def checkpoints(self) -> Path:
        return Path(self.keys["save"])

    def steps(self) -> list[int]:
        return sorted(int(path.name[11:]) for path in self.checkpoints.glob("global_step*") if path.name[11:].isdigit())

    def done(self) -> int:
        """The last iteration in the metrics."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            lines = (self.folder / "log/metrics.jsonl").read_text().splitlines()
            return int(json.loads(lines[-1])["iteration"])
        return 0

    def saved(self) -> int:
        with contextlib.suppress(OSError):
            return int((self.checkpoints / "latest").read_text().strip()[11:])
        return 0


def write_tokens(prefix: Path, seed: int) -> None:
    writer = IndexedWriter(prefix, np.dtype(np.uint16))
    random = np.random.RandomState(seed)
    for length in np.random.RandomState(7).randint(5, 60, size=60):  # the same lengths for every seed
        writer.add(random.randint(VOCAB - 48, size=length))
    writer.finish()


class LiveRun:
    """A long run started by deepy.py."""

    def __init__(self, place: Workplace, *words: str, wait: int = 6) -> None:
        self.place = place
        self.path = place.folder / "output"
        with self.path.open("w") as output:
            self.process = subprocess.Popen(
                place.command("--train_iters", "100000", *words),
                stdout=output,
                stderr=output,
                cwd=place.folder,
                env=environment(),
                start_new_session=True,
            )
        deadline = time.monotonic() + BOUND_SECONDS
        first = place.saved()
        while wait and place.done() < first + wait:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the run did not start:\n{self.path.read_text()}")
            time.sleep(0.05)
        self.begun = time.monotonic()

    def ranks(self) -> list[int]:
        (supervisor,) = children(self.process.pid)
        return sorted(children(supervisor))

    def everything(self) -> list[int]:
        return [self.process.pid, *children(self.process.pid), *self.ranks()]

    def end(self) -> Observed:
        """Wait for the end of the run. `begun` is the time of the fault."""
        try:
            code = self.process.wait(timeout=BOUND_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return Observed(-1, "did not end", self.path.read_text(), BOUND_SECONDS, "unknown")
        seconds = time.monotonic() - self.begun
        output = self.path.read_text()
        lost = max(0, self.place.done() - self.place.saved())
        return Observed(code, last_line(output), output, seconds, f"{lost} iterations" if lost else "none")

    def inject(self, fault: Callable[[], object]) -> Observed:
        self.begun = time.monotonic()
        fault()
        return self.end()


def start(place: Workplace, *words: str, before: Callable[[], None] | None = None) -> Observed:
    """Run a command to its end."""
    begun = time.monotonic()
    done = subprocess.run(
        place.command(*words),
        capture_output=True,
        text=True,
        cwd=place.folder,
        env=environment(),
        timeout=BOUND_SECONDS,
        preexec_fn=before,
    )
    output = done.stdout + done.stderr
    return Observed(done.returncode, last_line(done.stderr or output), output, time.monotonic() - begun)


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def listening_ports(pids: list[int]) -> list[tuple[bool, int]]:
    """(bound to loopback, port) of every TCP socket on which one of these processes listens."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link))
                if match:
                    inodes.add(match[1])
    found = []
    for table, loopback in (("tcp", "0100007F"), ("tcp6", "0" * 24 + "01000000")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            address, _, port = fields[1].partition(":")
            if fields[3] == "0A" and fields[9] in inodes:
                found.append((address == loopback, int(port, 16)))
    return sorted(set(found))


def send_everything_foreign(ports: list[int]) -> tuple[int, int]:
    """Send all of `foreign_messages` to every port; returns the numbers of raw and of forged messages."""
    raw = sum(send_raw(port) for port in ports)
    stores = [str(port) for port in ports if is_store(port)]
    client = [sys.executable, "-m", "benchmarks.foreign_messages", *stores]
    done = subprocess.run(client, capture_output=True, text=True, timeout=BOUND_SECONDS, cwd=ROOT)
    return raw, int(done.stdout or 0)


def write_nan(path: Path) -> None:
    """Write a NaN into an optimizer file and update the manifest: wrong data, but not a damaged file."""
    manifest = read_manifest(path.parent)
    entry = manifest.files[path.name]
    first = entry.ranges[0]
    array, length = first.arrays["exp_avg"], ITEM * min(len(first.where), BLOCK)
    content = bytearray(path.read_bytes())
    content[array.offset : array.offset + ITEM] = struct.pack("<f", float("nan"))
    path.write_bytes(content)
    sums = (zlib.crc32(content[array.offset : array.offset + length]), *array.checksums[1:])
    arrays = {**first.arrays, "exp_avg": replace(array, checksums=sums)}
    entry = replace(entry, checksum=file_checksum(path), ranges=(replace(first, arrays=arrays), *entry.ranges[1:]))
    write_manifest(path.parent, replace(manifest, files={**manifest.files, path.name: entry}))
