"""Effects of merging on a small model: a run like AstroSage-70B's, and losses before and after several merges.

    python examples/merging.py --output merging_out [--steps 300] [--seed 0]

With `transformers` alone: a base model on general text; from it a continued pre-training (cpt) on domain text; from
that a fine-tune on questions about the domain (sft); and an instruct model, which is a fine-tune of the *base* on
general questions. Then `tools/merge` puts 70% of sft and 30% of instruct on cpt in several ways. Printed are losses, in
nats per token, on held-out text of each kind. The models have 1.8 million parameters: read the differences between
rows, not the figures.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from examples.demo_base_model import config_of  # noqa: E402
from examples.fitting import fit  # noqa: E402

LENGTH = 128
KINDS = ("general", "domain", "general questions", "domain questions")
WEIGHTS = {"sft": 0.7, "instruct": 0.3}


def documents(text: Path, questions: bool) -> list[str]:
    """Documents as they are, or as a question (their first words) with its answer (the words that follow)."""
    texts = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    if not questions:
        return texts
    words = [text.split() for text in texts]
    return [f"User: what follows {' '.join(w[:8])}?\nAssistant: {' '.join(w[8:40])}" for w in words if len(w) > 20]


def pieces(texts: list[str], tokenizer: Any) -> Tensor:
    """The concatenated documents as token ids, in rows of LENGTH."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def batches(sources: list[Tensor], steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of eight rows, from each source in turn; every token has a label."""
    chance = random.Random(seed)
    for step in range(steps):
        rows = sources[step % len(sources)]
        batch = rows[torch.tensor([chance.randrange(len(rows)) for _ in range(8)])]
        yield batch, batch


def train(model: LlamaForCausalLM, sources: list[Tensor], steps: int, rate: float, seed: int, name: str) -> None:
    """Train with AdamW, a warm-up and a linear decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 20) * (1 - s / (steps + 1)))
    fit(model, batches(sources, steps, seed), optimizer, schedule, steps=steps, name=name)


@torch.no_grad()
def losses(folder: Path, held_out: dict[str, Tensor]) -> dict[str, float]:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return {
        kind: sum(float(model(input_ids=row, labels=row).loss) * len(row) for row in rows.split(16)) / len(rows)
        for kind, rows in held_out.items()
    }


def recipe(out: Path, density: float, own_base: bool, method: str = "dare_ties") -> dict[str, Any]:
    """70% sft and 30% instruct on cpt; with `own_base`, instruct's delta is to the base it was made from."""
    models: list[dict[str, Any]] = []
    for name, weight in WEIGHTS.items():
        models.append({"model": str(out / name), "parameters": {"weight": weight}})
        if method == "dare_ties":
            models[-1]["parameters"]["density"] = density
    if method == "linear":
        return {"merge_method": "linear", "models": models}
    if own_base:
        models[-1]["base"] = str(out / "base")
    return {"merge_method": method, "base_model": str(out / "cpt"), "models": models, "random_seed": 1}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300, help="of the base model; the others take fewer")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out, steps = options.output, options.steps
    out.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, ROOT / "examples/demo_data.py", "--output", out], check=True, capture_output=True)
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    training, held_out = (
        {
            kind: pieces(documents(out / f"text/{kind.split()[0]}_{part}.jsonl", "questions" in kind), tokenizer)
            for kind in KINDS
        }
        for part in ("train", "valid")
    )
    held_out = {kind: rows[:64] for kind, rows in held_out.items()}
    # Train the models, each from an earlier one.
    torch.manual_seed(options.seed)
    model = LlamaForCausalLM(config_of(ROOT / "configs/tiny/model.yml", tokenizer))
    base = [training["general"]]
    ways = {  # name: (made from, its texts, steps, learning rate)
        "base": (None, base, steps, 3e-3),
        "cpt": ("base", [training["domain"], training["domain"], training["general"]], steps * 2 // 3, 2e-3),
        "sft": ("cpt", [training["domain questions"]], steps // 3, 5e-4),
        "instruct": ("base", [training["general questions"]], steps // 3, 5e-4),
    }
    for name, (start, sources, count, rate) in ways.items():
        if start is not None:
            model = LlamaForCausalLM.from_pretrained(out / start, dtype=torch.float32)
        train(model, sources, count, rate, options.seed, name)
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    # Merge them in several ways and compare the losses.
    merges = {
        "linear": recipe(out, 1, False, "linear"),
        **{f"density {d:g}": recipe(out, d, False) for d in (1, 0.5, 0.1)},
        **{f"density {d:g}, own base": recipe(out, d, True) for d in (1, 0.5, 0.1)},
    }
    results = {name: losses(out / name, held_out) for name in ways}
    for number, (name, body) in enumerate(merges.items()):
        path = out / f"merge{number}.yml"
        path.write_text(json.dumps(body))
        command = [
            sys.executable,
            ROOT / "tools/merge",
            path,
            "--output",
            out / f"merged{number}",
            "--force",
            "--quiet",
        ]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        results[name] = losses(out / f"merged{number}", held_out)
    print("| model | " + " | ".join(KINDS) + " |\n|---|" + "---|" * len(KINDS))
    for name, row in results.items():
        print(f"| {name} | " + " | ".join(f"{row[kind]:.3f}" for kind in KINDS) + " |")
    (out / "losses.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
