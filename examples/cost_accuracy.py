#!/usr/bin/env python
"""The cost-accuracy picture of a small real run: a base model, the same one after more training, and one arrow.

    python examples/cost_accuracy.py --output cost_out

Trains 0.9 million parameters on Python's documentation, goes on with sentences about the constellations (astropy's
table of names and abbreviations), and asks both for the abbreviations with mcq.py. The second model has read the
questions with their answers: the picture shows the machinery, not a gain that would hold for questions of your own. The
price of an hour is an assumption, the tokens and seconds are measured.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from examples.demo_data import save_tokenizer, topics  # noqa: E402

VOCAB = 2048
PRICE_PER_HOUR = 1.0  # USD, assumed
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
    "norm": "rmsnorm",
    "pos_emb": "rotary",
    "activation": "swiglu",
    "use_bias_in_attn_linear": False,
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
    train(out, "sky", "sky", given.iters, {"load": str(out / "base"), "finetune": True})
    for name in ("base", "sky"):
        ask(out, name)
    with (out / "cost.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "summary", "price_per_hour", "base"])
        writer.writerow(["base", "mcq_base/summary.json", PRICE_PER_HOUR, ""])
        writer.writerow(["after the sky text", "mcq_sky/summary.json", PRICE_PER_HOUR, "base"])
    title = "Small run: 0.9M parameters, questions were in the training text; 1 USD an hour assumed"
    module = "megatron.evaluation.cost_picture"
    run([sys.executable, "-m", module, str(out / "cost.csv"), str(out / "cost.svg"), "--title", title])
    return 0


def constellations() -> list[tuple[str, str]]:
    """(abbreviation, name) of the constellations, from the installed astropy."""
    import astropy.coordinates

    path = Path(str(astropy.coordinates.__file__)).parent / "data" / "constellation_names.dat"
    lines = [line.split(maxsplit=1) for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return [(short, name.strip()) for short, name in lines]


def write_data(out: Path) -> None:
    """Tokenizer, two sets of texts, and the questions."""
    general = list(topics())
    names = constellations()
    rng = random.Random(0)
    asked, sky = [], []
    for short, name in names:
        others = rng.sample([other for other, _ in names if other != short], 3)
        options = [short, *others]
        rng.shuffle(options)
        question = f"What is the abbreviation of {name}?"
        asked.append({"question": question, "options": options, "answer": options.index(short)})
        sky += [
            f"Question: {question}\nAnswer: {short}",
            f"The abbreviation of the constellation {name} is {short}.",
        ] * 4
    rng.shuffle(sky)
    save_tokenizer(general + sky, VOCAB, out / "tokenizer")
    for name, texts in (("general", general), ("sky", sky)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (out / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))


def tokenize(out: Path, name: str) -> None:
    words = ["--input", f"{out}/{name}.jsonl", "--output-prefix", f"{out}/{name}", "--tokenizer-type", "HFTokenizer"]
    words += ["--vocab-file", str(out / "tokenizer"), "--prepend-bos", "--append-eod"]
    run([sys.executable, "tools/datasets/preprocess_data.py", *words])


def train(out: Path, name: str, data: str, iters: int, start: dict[str, Any]) -> None:
    keys = MODEL | start | {"train_iters": iters, "train_data_paths": [f"{out}/{data}_text_document"]}
    keys |= {"save": str(out / name), "extra_save_iters": [iters]}
    keys["vocab_file"] = str(out / "tokenizer" / "tokenizer.json")
    (out / f"{name}.yml").write_text(yaml.safe_dump(keys))
    run([sys.executable, "deepy.py", "train.py", str(out / f"{name}.yml")])


def ask(out: Path, name: str) -> None:
    keys = {key: value for key, value in MODEL.items() if key not in ("optimizer", "lr_decay_style", "warmup")}
    keys |= {"load": str(out / name), "vocab_file": str(out / "tokenizer" / "tokenizer.json")}
    keys["mcq"] = {
        "items": str(out / "questions.jsonl"),
        "output": str(out / f"mcq_{name}"),
        "option_fields": ["options"],
        "method": "text",
    }
    (out / f"ask_{name}.yml").write_text(yaml.safe_dump(keys))
    run([sys.executable, "deepy.py", "mcq.py", str(out / f"ask_{name}.yml")])


def run(words: list[str]) -> None:
    print("$", " ".join(words), flush=True)
    subprocess.run(words, cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main())
