"""Stand-ins for the four models that AstroSage-70B downloads: Meta-Llama-3.1 and three instruct models made of it.

    python examples/astrosage/base_models.py --output astrosage_out --seed 0

Writes Hugging Face folders `hf_base` and `hf_instruct_1` to `hf_instruct_3`, trained with `transformers` alone. The
base model reads text about the elements and a few famous objects, with questions and answers as in web text; the
instruct models are fine-tunes of it on conversations about the elements. None knows the objects of the domain.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.astrosage import wordings  # noqa: E402
from examples.astrosage.facts import Element  # noqa: E402
from examples.demo_base_model import config_of  # noqa: E402
from examples.fitting import fit  # noqa: E402

LENGTH, ROWS = 128, 2  # tokens in a row, rows in a batch
Batch = tuple[Tensor, Tensor]


def text_batches(path: Path, tokenizer: Any, steps: int, chance: random.Random) -> Iterator[Batch]:
    """Rows of LENGTH tokens from the concatenated documents, reshuffled for every pass."""
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    documents = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]
    rows = torch.empty(0, LENGTH, dtype=torch.long)
    for _ in range(steps):
        if len(rows) < ROWS:
            chance.shuffle(documents)
            stream = torch.tensor([token for document in documents for token in document])
            rows = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
        yield rows[:ROWS], rows[:ROWS]
        rows = rows[ROWS:]


def chat_batches(elements: list[Element], tokenizer: Any, steps: int, chance: random.Random) -> Iterator[Batch]:
    """Batches of eight conversations about elements; only the answers have labels."""
    for _ in range(steps):
        rows = [conversation(*wordings.asked_of_element(chance.choice(elements), chance), tokenizer) for _ in range(8)]
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in rows])
        yield ids, torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows])


def conversation(question: str, answer: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(ids, labels) of a question with its answer under the system prompt that turns reasoning off."""
    turns = [{"role": "system", "content": "detailed thinking off"}, {"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    asked = tokenizer(prompt, add_special_tokens=False).input_ids
    told = tokenizer(answer + "<|eot_id|>", add_special_tokens=False).input_ids
    return asked + told, [-100] * len(asked) + told


def train(model: LlamaForCausalLM, batches: Iterator[Batch], steps: int, rate: float, name: str) -> None:
    """Train with AdamW, a warm-up over a twentieth of the steps and a linear decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / (0.05 * steps)) * (1 - 0.95 * step / steps)
    )
    loss = fit(model, batches, optimizer, schedule, steps=steps, name=name)
    print(f"{name}: {steps} steps, last training loss {loss:.3f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=ROOT / "examples/astrosage/model.yml")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of the base model")
    parser.add_argument("--instruct", type=int, default=3, help="how many instruct models")
    parser.add_argument("--instruct-steps", type=int, default=150)
    options = parser.parse_args()
    out, chance = options.output, random.Random(options.seed)
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    model = LlamaForCausalLM(config_of(options.model, tokenizer))
    texts = text_batches(out / "base/text.jsonl", tokenizer, options.steps, chance)
    train(model, texts, options.steps, 2e-3, "base")
    model.save_pretrained(out / "hf_base")
    tokenizer.save_pretrained(out / "hf_base")
    elements = [Element(**one) for one in json.loads((out / "facts.json").read_text())["general_asked"]]
    for number in range(1, options.instruct + 1):
        model = LlamaForCausalLM.from_pretrained(out / "hf_base", dtype=torch.float32)
        batches = chat_batches(elements, tokenizer, options.instruct_steps, chance)
        train(model, batches, options.instruct_steps, 5e-4, f"instruct {number}")
        model.save_pretrained(out / f"hf_instruct_{number}")
        tokenizer.save_pretrained(out / f"hf_instruct_{number}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
