"""What a run needs besides weights and optimizer: its position, and the random states of each rank."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Base:
    """The weights that an adapter is trained on: a readable name, the step's folder, and `base_fingerprint`."""

    name: str
    folder: str
    fingerprint: str


@dataclass
class TrainState:
    """Position of a run. The trainer keeps one, updates it every step and hands it to each save.

    `consumed_samples` is the position in the order of samples, including those left out (`skip_sample_ranges`); the
    next step reads from there. `skipped_in_a_row` counts the latest consecutive optimizer steps skipped for non-finite
    values; the engine's counters hold the total. `hf_files`, on rank 0 only, are the files of the `hf/` folder
    (config.json, tokenizer) that came with the loaded checkpoint; every later checkpoint carries them. `started_from`
    is the step in its own save folder that the run has resumed, which retention keeps. `base` is set in a run with
    `lora`.
    """

    iteration: int = 0
    consumed_samples: int = 0
    skipped_in_a_row: int = 0
    hf_files: dict[str, bytes] = field(default_factory=dict, repr=False)
    started_from: int | None = None
    base: Base | None = None


def capture_rng() -> dict[str, Any]:
    """State of this rank's generators (random, numpy, torch, the current GPU) as tensors and plain values."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def rng_to_bytes(state: dict[str, Any]) -> bytes:
    """The state of `capture_rng` as JSON."""
    version, words, gauss = state["python"]
    name, keys, *rest = state["numpy"]
    body: dict[str, Any] = {"python": [version, list(words), gauss], "numpy": [name, keys.tolist(), *rest]}
    body |= {key: state[key].numpy().tobytes().hex() for key in ("torch", "cuda") if key in state}
    return json.dumps(body).encode()


def rng_from_bytes(data: bytes) -> dict[str, Any]:
    """What `restore_rng` takes, from `rng_to_bytes`; ValueError if it is something else."""
    try:
        body = json.loads(data)
        version, words, gauss = body["python"]
        name, keys, *rest = body["numpy"]
        state: dict[str, Any] = {
            "python": (version, tuple(words), gauss),
            "numpy": (name, torch.tensor(keys, dtype=torch.int64), *rest),
        }
        for key in ("torch", "cuda"):
            if key in body:
                state[key] = torch.frombuffer(bytearray.fromhex(body[key]), dtype=torch.uint8)
        return state
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"these are not random states: {error}") from error
