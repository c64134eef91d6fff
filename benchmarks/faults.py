"""Fault injection: each fault is injected into a real run of four CPU ranks; the outcome is printed as a table.

    python benchmarks/faults.py [--only WORDS] [--write docs/reliability.md]
    python benchmarks/faults.py --engine megatron [--write docs/engines.md]

Every fault has an expected message and exit code. A fault that is undetected, or has a different message or code, is
marked, and the exit code is 1. Needs what a training run needs; a full disk is a small tmpfs when run as root,
otherwise a limit on the size of files.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.fault_runs import (  # noqa: E402
    ENGINES,
    LiveRun,
    Observed,
    Workplace,
    listening_ports,
    send_everything_foreign,
    start,
    write_nan,
    write_tokens,
)

MARKER = "faults"
LAYER, OPTIMIZER = "layer_03-model_01-model_states.pt", "rank_00001_optim_states.safetensors"
OTHER_RATE = "{type: Adam, params: {lr: 2.0e-3, betas: [0.9, 0.95], eps: 1.0e-8}}"


@dataclass(frozen=True)
class Fault:
    """`run` injects it; the output must match `said` and the exit code be `code`."""

    name: str
    run: Callable[[Workplace], Observed]
    said: str
    code: int
    warns: bool = False  # deliberately allowed: prints a line, and the run continues
    ends: bool = True  # whether the message must be the last line


FAULTS: list[Fault] = []


def fault(name: str, said: str, code: int, *, warns: bool = False, ends: bool = True) -> Callable[..., None]:
    def add(run: Callable[[Workplace], Observed]) -> None:
        FAULTS.append(Fault(name, run, said, code, warns, ends and not warns))

    return add


# --- processes and signals


@fault("kill -9 of a rank", r"rank 2 on \S+ was killed by SIGKILL", 137)
def _(place: Workplace) -> Observed:
    run = LiveRun(place)
    return run.inject(lambda: os.kill(run.ranks()[2], signal.SIGKILL))


@fault("kill -9 of the launcher, then the same command", "continues from the last one", 0, ends=False)
def _(place: Workplace) -> Observed:
    run = LiveRun(place)
    ranks = run.ranks()
    ended = run.inject(run.process.kill)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
    again = start(place, "--train_iters", str(place.saved() + 2))
    return replace(again, lost=ended.lost, seconds=ended.seconds)


@fault("kill -9 of all processes during a save, then the same command", "continues from the last one", 0, ends=False)
def _(place: Workplace) -> Observed:
    run = LiveRun(place, "--checkpoint_factor", "2")
    before = place.saved()

    def kill() -> None:
        deadline = time.monotonic() + 60
        while not list(place.checkpoints.glob("*.tmp")) and time.monotonic() < deadline:
            pass
        for pid in run.everything():
            os.kill(pid, signal.SIGKILL)

    ended = run.inject(kill)
    again = start(place, "--train_iters", str(max(before, place.saved()) + 2))
    return replace(again, lost=ended.lost, seconds=ended.seconds)


@fault("SIGSTOP of a rank", r"1 rank lost: rank 3 on \S+ .*no sign of life", 76)
def _(place: Workplace) -> Observed:
    run = LiveRun(place)
    return run.inject(lambda: os.kill(run.ranks()[3], signal.SIGSTOP))


@fault("SIGTERM", "SIGTERM at iteration .* all is saved", 75)
def _(place: Workplace) -> Observed:
    run = LiveRun(place)
    return run.inject(run.process.terminate)


@fault("SIGUSR1", "SIGUSR1 at iteration .* all is saved", 75)
def _(place: Workplace) -> Observed:
    run = LiveRun(place)
    return run.inject(lambda: run.process.send_signal(signal.SIGUSR1))


@fault("SIGUSR1 during the start", "SIGUSR1 at iteration .* all is saved", 75)
def _(place: Workplace) -> Observed:
    run = LiveRun(place, wait=0)
    time.sleep(0.3)
    return run.inject(lambda: run.process.send_signal(signal.SIGUSR1))


@fault("Ctrl-C", "Ctrl-C at iteration .* all is saved", 75)
def _(place: Workplace) -> Observed:
    run = LiveRun(place)
    return run.inject(lambda: run.process.send_signal(signal.SIGINT))


# --- the disk


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[bool]:
    """A file system of `kib` KiB, if this user may mount one; a checkpoint takes about 900 KiB."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}K", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def full_disk(place: Workplace, kib: int, *words: str) -> Observed:
    folder = place.folder / "small"
    with small_disk(folder, kib) as mounted:
        place.keys["save"] = str(folder / "checkpoints")
        return start(place, *words, before=None if mounted else limit_files)


FULL = r"rank \d.*(No space left on device|File too large)"


@fault("full disk", FULL, 2)
def _(place: Workplace) -> Observed:
    return full_disk(place, 1500)


@fault("full disk, async_save", rf"{FULL}.*The run goes on without this checkpoint", 2, ends=False)
def _(place: Workplace) -> Observed:
    return full_disk(place, 500, "--async_save", "true", "--paths-on-nodes")  # else it stops before it starts


# --- damaged and missing files


def damage(path: Path, zeros: int = 0) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + max(zeros, 1)] = bytes(zeros) if zeros else bytes([content[middle] ^ 0x10])
    path.write_bytes(content)


def damaged(name: str, zeros: int) -> Callable[[Workplace], Observed]:
    def run(place: Workplace) -> Observed:
        damage(place.checkpoints / "global_step12" / name, zeros)
        return start(place, "--train_iters", "14")

    return run


for _kind, _name in (("a layer file", LAYER), ("an optimizer file", OPTIMIZER), ("the manifest", "manifest.json")):
    fault(f"a byte of {_kind} flipped", rf"{re.escape(_name)}", 2)(damaged(_name, 0))
    fault(f"a block of {_kind} zeroed", rf"{re.escape(_name)}", 2)(damaged(_name, 512))


@fault("NaN in an optimizer file whose checksum is right", r"exp_avg of .* not finite", 2)
def _(place: Workplace) -> Observed:
    write_nan(place.checkpoints / "global_step12" / OPTIMIZER)
    return start(place, "--train_iters", "14")


def removed(*names: str) -> Callable[[Workplace], Observed]:
    def run(place: Workplace) -> Observed:
        for name in names:
            (place.folder / name).unlink()
        return start(place, "--train_iters", "14")

    return run


fault("a layer file removed", rf"is not complete: .*{LAYER} is missing", 2, ends=False)(
    removed(f"checkpoints/global_step12/{LAYER}")
)
fault("`latest` removed", "latest cannot be read .*complete in .*: steps 4, 8, 12", 2, ends=False)(
    removed("checkpoints/latest")
)
fault("the data removed", "data.bin: no such file", 2, ends=False)(removed("data.bin"))
fault("the data's index removed", "data.idx: no such file", 2, ends=False)(removed("data.idx"))


@fault("a cached order of samples damaged", "damaged index; remove this folder", 2, ends=False)
def _(place: Workplace) -> Observed:
    next((place.folder / "index_cache").glob("*/samples.npy")).unlink()
    return start(place, "--train_iters", "14")


@fault("the data changed in place", "data differs from what this run was trained on so far", 0, warns=True)
def _(place: Workplace) -> Observed:
    write_tokens(place.folder / "data", seed=5)
    return start(place, "--train_iters", "14")


# --- another configuration on resume


def changed(*words: str) -> Callable[[Workplace], Observed]:
    return lambda place: start(place, "--train_iters", "14", *words)


fault("another rotary_emb_base on resume", "rotary_emb_base: 10000.0 in the checkpoint, 500000.0", 2, ends=False)(
    changed("--rotary_emb_base", "500000")
)
fault("another rms_norm_epsilon on resume", "rms_norm_epsilon: 1e-05 in the checkpoint, 1e-06", 2, ends=False)(
    changed("--rms_norm_epsilon", "1e-6")
)
fault("another batch on resume", r"train_batch_size +2 -> 4", 0, warns=True)(
    changed("--gradient_accumulation_steps", "4")
)
fault("another seq_length on resume", r"seq_length +16 -> 32", 0, warns=True)(changed("--seq_length", "32"))
fault("another learning rate on resume", r"optimizer.params.lr +0.001 -> 0.002", 0, warns=True)(
    changed("--optimizer", OTHER_RATE)
)


@fault("another tokenizer on resume", r"tokenizer +.crc32:\w+. -> .crc32:\w+.", 0, warns=True)
def _(place: Workplace) -> Observed:
    return start(place, "--train_iters", "14", "--vocab_file", str(place.folder / "tokenizer2.json"))


@fault("train_iters below the checkpoint's iteration", "stands at iteration 12, train_iters is 6", 2)
def _(place: Workplace) -> Observed:
    return start(place, "--train_iters", "6")


# --- others


@fault("a second run in the same folder", r"belongs to another run: process \d+ on", 2, ends=False)
def _(place: Workplace) -> Observed:
    run = LiveRun(place)
    second = start(place, "--train_iters", "100000")
    run.process.terminate()
    first = run.end()
    if first.code != 75:
        raise SystemExit(f"the first run did not survive the second:\n{first.output}")
    return second


@fault("foreign and malformed messages to every port", r"SIGTERM at iteration .* all is saved", 75)
def _(place: Workplace) -> Observed:
    """The run must continue; it is then stopped normally."""
    run = LiveRun(place)
    ports = listening_ports(run.everything())
    beyond = [port for loopback, port in ports if not loopback]
    raw, forged = send_everything_foreign([port for _, port in ports])
    before = place.done()
    deadline = time.monotonic() + 30
    while place.done() < before + 3 and run.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if run.process.poll() is not None or place.done() < before + 3:
        return replace(run.end(), last_line="the run did not go on")
    ended = run.inject(run.process.terminate)
    ignored = re.findall(r"watchdog: (\d+) messages from outside this run were ignored", ended.output)
    if not forged or not ignored:
        return replace(ended, last_line="no forged message was noticed")
    readings = sum(map(int, ignored))
    text = (
        f"{raw} malformed messages to {len(ports)} ports, {len(beyond)} beyond loopback; of {forged} forged or "
        f"replayed ones {readings} readings ignored; the run went on: {ended.last_line.removeprefix('deepy.py: ')}"
    )
    return replace(ended, last_line=text)


# --- the table


def judged(fault_: Fault, seen: Observed) -> bool:
    where = seen.last_line if fault_.ends else seen.output
    return seen.code == fault_.code and re.search(fault_.said, where, re.DOTALL) is not None


def message(fault_: Fault, seen: Observed, place: Workplace) -> str:
    """The line with the message, without machine-dependent parts."""
    lines = [line for line in seen.output.splitlines() if re.search(fault_.said, line)]
    text = seen.last_line if fault_.ends or not lines else lines[-1]
    for path in (place.folder, place.folder.parent):
        text = text.replace(str(path), "RUN")
    text = re.sub(r"\b" + re.escape(socket.gethostname()) + r"\b", "NODE", text)
    text = text.replace("|", "\\|").strip()
    for prefix in ("deepy.py: ", "warning: ", "- ", "stopped: ", "error: "):
        text = text.removeprefix(prefix)
    return text if len(text) <= 200 else text[:197] + "..."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="run only faults whose name contains these words")
    parser.add_argument("--engine", choices=list(ENGINES), default="deepspeed", help="with virtual stages for megatron")
    parser.add_argument("--write", type=Path, help="replace the table between the markers of this page")
    options = parser.parse_args()
    rows = ["| fault | detected | message | work lost | ends after | exit code |", "|---|---|---|---|---|---|"]
    undetected = 0
    with tempfile.TemporaryDirectory(prefix="neox_faults_") as root:
        base = Workplace.make(Path(root) / "base", options.engine)
        finished = start(base)
        if finished.code != 0 or base.steps() != [4, 8, 12]:
            print(finished.output, file=sys.stderr)
            return 1
        for number, fault_ in enumerate(FAULTS):
            if options.only and options.only not in fault_.name:
                continue
            place = base.copy(f"fault{number}")
            seen = fault_.run(place)
            right = judged(fault_, seen)
            undetected += not right
            kind = "**no**" if not right else "yes, goes on" if fault_.warns else "yes"
            text = message(fault_, seen, place)
            rows.append(f"| {fault_.name} | {kind} | {text} | {seen.lost} | {seen.seconds:.0f} s | {seen.code} |")
            print(rows[-1], flush=True)
            if not right:
                print(f"expected {fault_.said!r} and {fault_.code}; the output:\n{seen.output[-3000:]}", flush=True)
            shutil.rmtree(place.folder, ignore_errors=True)
    print(f"{len(rows) - 2} faults, {undetected} undetected")
    if options.write and not options.only:
        text = options.write.read_text()
        begin, end = f"<!-- {MARKER}:begin -->", f"<!-- {MARKER}:end -->"
        head, rest = text.split(begin)
        options.write.write_text(f"{head}{begin}\n" + "\n".join(rows) + f"\n{end}{rest.split(end)[1]}")
    return 1 if undetected else 0


if __name__ == "__main__":
    sys.exit(main())
