#!/usr/bin/env python
"""The cost-accuracy picture of a small real run: a base model, and an arrow to the same model after more training.

    python examples/cost_accuracy.py --output cost_out

Trains 0.9 million parameters on Python's documentation, then on sentences about the constellations (astropy's table of
names and abbreviations). For half of them, questions with answers follow the sentences; mcq.py asks both models about
the other half, whose questions neither has seen. Scores are calibrated, because the sum of log-probabilities alone
prefers abbreviations of common letters, whatever the question. Tokens and seconds are measured, the price of an hour is
assumed. So small a model demonstrates the tools and says nothing about larger ones.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from examples.demo_data import save_tokenizer, topics  # noqa: E402
from examples.llama_keys import LLAMA  # noqa: E402
from examples.steps import Steps  # noqa: E402

STEPS = Steps()

VOCAB = 2048
PRICE_PER_HOUR = 1.0  # USD, assumed
SENTENCES = (
    "The abbreviation of the constellation {name} is {short}.",
    "{name} is written as {short} on a star map.",
    "Astronomers shorten the name {name} to {short}.",
)
MODEL = {
    "num_layers": 3,
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_kv_heads": 4,
    "intermediate_size": 352,
    "vocab_size": VOCAB,
    "make_vocab_size_divisible_by": 1,
    "no_weight_tying": False,
    "max_position_embeddings": 128,
    **LLAMA,
    "rms_norm_epsilon": 1e-5,
    "rotary_emb_base": 500000,
    "seq_length": 128,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 1,
    "precision": "fp32",
    "distributed_backend": "gloo",
    "num_gpus": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "betas": [0.9, 0.95], "eps": 1e-8}},
    "lr_decay_style": "cosine",
    "warmup": 0.1,
    "log_interval": 50,
    "eval_iters": 0,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A small run for the cost-accuracy picture.")
    parser.add_argument("--output", type=Path, default=Path("cost_out"))
    parser.add_argument("--iters", type=int, default=200, help="steps of each of the two trainings")
    given = parser.parse_args(arguments)
    out: Path = given.output.resolve()
    out.mkdir(parents=True, exist_ok=True)
    write_data(out)
    for name in ("general", "sky"):
        tokenize(out, name)
    train(out, "base", "general", given.iters, {"from_scratch": True})
    # After so short a training the loss is high enough for the guard to suspect a damaged checkpoint.
    again = {"load": str(out / "base"), "finetune": True, "allow_high_initial_loss": True}
    train(out, "sky", "sky", given.iters, again)
    for name in ("base", "sky"):
        ask(out, name)
    with (out / "cost.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "summary", "price_per_hour", "base"])
        writer.writerow(["base", "mcq_base/summary.json", PRICE_PER_HOUR, ""])
        writer.writerow(["after the sky text", "mcq_sky/summary.json", PRICE_PER_HOUR, "base"])
    title = "Small run: 0.9M parameters, 44 questions not seen in training; 1 USD an hour assumed"
    STEPS.python("-m", "megatron.evaluation.cost_picture", out / "cost.csv", out / "cost.svg", "--title", title)
    return 0


def constellations() -> list[tuple[str, str]]:
    """(abbreviation, name) of the constellations, from the installed astropy."""
    import astropy.coordinates

    path = Path(str(astropy.coordinates.__file__)).parent / "data" / "constellation_names.dat"
    lines = [line.split(maxsplit=1) for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return [(short, name.strip()) for short, name in lines]


def write_data(out: Path) -> None:
    """Write the tokenizer, two sets of texts, and the questions."""
    general = list(topics())
    names = constellations()
    rng = random.Random(0)
    rng.shuffle(names)
    asked, sky = [], []
    for number, (short, name) in enumerate(names):
        question = f"What is the abbreviation of {name}?"
        sky += [sentence.format(name=name, short=short) for sentence in SENTENCES] * 4
        if number % 2:
            sky += [f"Question: {question}\nAnswer: {short}"] * 4
            continue
        options = [short, *rng.sample([other for other, _ in names if other != short], 3)]
        rng.shuffle(options)
        asked.append({"question": question, "options": options, "answer": options.index(short)})
    rng.shuffle(sky)
    save_tokenizer(general + sky, VOCAB, out / "tokenizer")
    for name, texts in (("general", general), ("sky", sky)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (out / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))


def tokenize(out: Path, name: str) -> None:
    words = ["--input", f"{out}/{name}.jsonl", "--output-prefix", f"{out}/{name}", "--tokenizer-type", "HFTokenizer"]
    words += ["--vocab-file", str(out / "tokenizer"), "--prepend-bos", "--append-eod"]
    STEPS.python("tools/datasets/preprocess_data.py", *words)


def train(out: Path, name: str, data: str, iters: int, start: dict[str, Any]) -> None:
    keys = MODEL | start | {"train_iters": iters, "train_data_paths": [f"{out}/{data}_text_document"]}
    keys |= {"save": str(out / name), "extra_save_iters": [iters]}
    keys["vocab_file"] = str(out / "tokenizer" / "tokenizer.json")
    (out / f"{name}.yml").write_text(yaml.safe_dump(keys))
    STEPS.python("deepy.py", "train.py", out / f"{name}.yml")


def ask(out: Path, name: str) -> None:
    keys = {key: value for key, value in MODEL.items() if key not in ("optimizer", "lr_decay_style", "warmup")}
    keys |= {"load": str(out / name), "vocab_file": str(out / "tokenizer" / "tokenizer.json")}
    keys["mcq"] = {
        "items": str(out / "questions.jsonl"),
        "output": str(out / f"mcq_{name}"),
        "option_fields": ["options"],
        "method": "text",
        "text_score": "calibrated",
    }
    (out / f"ask_{name}.yml").write_text(yaml.safe_dump(keys))
    STEPS.python("deepy.py", "mcq.py", out / f"ask_{name}.yml")


if __name__ == "__main__":
    sys.exit(main())
