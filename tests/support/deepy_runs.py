"""Runs of deepy.py on a small Llama: their settings and logged losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.support.models import LLAMA3_ROPE, Case

ROOT = Path(__file__).resolve().parents[2]
CASE = Case(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=48, vocab=96, seq=16, rope=LLAMA3_ROPE)


def write_run(path: Path, data: str, **changes: Any) -> None:
    """Write the configuration of a training of CASE on the documents at prefix `data`; None removes a key."""
    settings = dict(CASE.neox().merged) | {"train_data_paths": [data], "log_interval": 1} | changes
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))


def saving_at_the_end(steps: int, folder: str) -> dict[str, Any]:
    """Settings of a training that saves into `folder` only after its last step or on a stop request."""
    return {
        "train_iters": steps,
        "save": folder,
        "extra_save_iters": [steps],
        "lr_decay_style": "cosine",
        "warmup": 0.1,
    }


def losses(folder: Path) -> dict[int, float]:
    """Losses by iteration from `folder/log`; an incomplete last line is ignored."""
    path = folder / "log/metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {r["iteration"]: r["train/lm_loss"] for r in records if "train/lm_loss" in r}
