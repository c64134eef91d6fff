"""A small Llama with a real tokenizer, as a Hugging Face folder and on ranks, and questions for it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from megatron.neox_arguments import NeoXArgs
from tests.support.documentation import ROOT
from tests.support.models import LLAMA3_ROPE, Case
from tests.support.vocabulary import VOCAB_SIZE

CASE = Case(
    heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=48, vocab=VOCAB_SIZE, seq=256, rope=LLAMA3_ROPE, theta=5e5
)
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "tp1": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"model_parallel_size": 2}),
    "pp2": (2, {"pipe_parallel_size": 2}),
    "tp2pp2": (4, {"model_parallel_size": 2, "pipe_parallel_size": 2}),
}


def weights() -> dict[str, torch.Tensor]:
    """Random weights that prefer some tokens, so that greedy texts and choices differ between items."""
    state = CASE.hugging_face().state_dict()
    return {name: tensor * (1 if "norm" in name else 4) for name, tensor in state.items()}


def hidden_states(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    """Hidden states [layers, tokens, h] of each text by itself, by `transformers`."""
    model = CASE.hugging_face()
    model.load_state_dict(weights())
    found = []
    for text in texts:
        ids = torch.tensor([[tokenizer.bos, *tokenizer.encode(text)]])
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
        found.append(torch.cat(states).numpy())
    return found


def write_guide_inputs(place: Path, vocab_folder: Path, case: Case = CASE) -> None:
    """Write `hf/`, its conversion `checkpoints/` at TP2, and `model.yml` and `local.yml` for four ranks, TP2 x PP2."""
    from tools.convert_hf.cli import main

    export = write_export(place / "hf", vocab_folder, case)
    command = ["to-neox", "--input", str(export), "--output", str(place / "checkpoints"), "--tp", "2", "--quiet"]
    assert main(command) == 0
    keys = {name: value for name, value in case.neox().merged.items() if name not in ("from_scratch", "optimizer")}
    keys["vocab_file"] = str(export / "tokenizer.json")
    (place / "model.yml").write_text(yaml.safe_dump(keys))
    (place / "local.yml").write_text("model_parallel_size: 2\npipe_parallel_size: 2\nnum_gpus: 4\n")


def run_from(place: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a guide's `python ...` in `place`, with the scripts of the repository's root."""
    words = [
        str(ROOT / word) if (ROOT / word).suffix == ".py" and (ROOT / word).exists() else word
        for word in shlex.split(command)
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *words[1:]], cwd=place, env=env, capture_output=True, text=True, timeout=280, check=False
    )


def write_export(folder: Path, vocab_folder: Path, case: Case = CASE) -> Path:
    """Write the model as an exported Hugging Face folder with tokenizer and chat template."""
    from examples.demo_tokenizer import CHAT_TEMPLATE

    model = case.hugging_face()
    model.load_state_dict(weights())
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((vocab_folder / "tokenizer.json").read_bytes())
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|finetune_right_pad_id|>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def evaluation_args(world_size: int, export: Path, **keys: Any) -> NeoXArgs:
    return CASE.neox(world_size=world_size, vocab_file=str(export / "tokenizer.json"), **keys)


def driven(world_size: int, export: Path, program: Callable[..., Any], split: dict[str, int], **keys: Any) -> Any:
    """The result of `program(model, folder)` on rank 0 of the calling ranks; None on the others."""
    from megatron.evaluation.driver import drive
    from megatron.supervision.status_store import Whereabouts
    from tests.support.engine_runs import inference

    args = evaluation_args(world_size, export, **split, **keys)
    engine = inference(args, weights())
    return drive(engine, args, Whereabouts(), lambda model: program(model, export))


SKY = (
    ("Which constellation contains Messier 44?", "Cancer", "Tucana", "Scorpius", "Coma Berenices", "A"),
    ("Which constellation contains Messier 7?", "Leo", "Carina", "Scorpius", "Cygnus", "C"),
    ("Which constellation contains Messier 31?", "Ophiuchus", "Andromeda", "Fornax", "Sagittarius", "B"),
    ("What is the brightest star in the constellation of Lyra?", "Altair", "Deneb", "Rigel", "Vega", "D"),
    ("Which of these is a type of galaxy?", "cluster", "elliptical", "nebula", "quasar wind", "B"),
    ("At which wavelength does neutral hydrogen emit?", "21 cm", "3 mm", "656 nm", "1 cm", "A"),
    ("What does a parallax of one arcsecond correspond to?", "one au", "a light year", "one parsec", "a kpc", "C"),
    ("Which object ends its life as a white dwarf?", "a quasar", "a comet", "a planet", "the Sun", "D"),
)


def write_questions(path: Path, *, answers: bool = True, copies: int = 1) -> Path:
    """Write the questions as JSON lines, in AstroMLab-1's format, with a topic."""
    rows = []
    for number, (question, a, b, c, d, answer) in enumerate(SKY * copies):
        row = {"question": question, "A": a, "B": b, "C": c, "D": d, "topic": "where" if number % 3 else "what"}
        rows.append(row | ({"answer": answer} if answers else {}))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
