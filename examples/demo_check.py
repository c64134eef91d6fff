"""Evaluates Hugging Face folders by `transformers` in fp32: loss on the validation samples, answers to questions.

    python examples/demo_check.py --data demo_out/data --seq-length 128 --questions demo_out/questions.jsonl \
        --output check.json before=DIR after=DIR

The samples are read with megatron-core's own `IndexedDataset`; the loss is `transformers`' logits and torch's
cross-entropy. This project's model is not used.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoModelForCausalLM, AutoTokenizer


def samples(prefix: Path, seq_length: int) -> list[torch.Tensor]:
    """The concatenated documents in pieces of seq_length + 1 ids that overlap by one; the last may be shorter."""
    dataset = IndexedDataset(str(prefix))
    stream = torch.cat([torch.from_numpy(dataset[i].astype("int64")) for i in range(len(dataset))])
    return [stream[start : start + seq_length + 1] for start in range(0, len(stream) - 1, seq_length)]


@torch.no_grad()
def loss(model: torch.nn.Module, pieces: list[torch.Tensor]) -> float:
    total = 0.0
    for piece in pieces:
        logits = model(input_ids=piece[None, :-1]).logits[0]
        total += F.cross_entropy(logits.double(), piece[1:], reduction="sum").item()
    return total / sum(len(piece) - 1 for piece in pieces)


@torch.no_grad()
def answers(folder: Path, model: Any, questions: list[str]) -> dict[str, str]:
    """The model's greedy continuation of each question, to the end of the line."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {}
    for question in questions:
        ids = tokenizer(f"Question: {question}\nAnswer:", return_tensors="pt").input_ids
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        found[question] = text.strip().split("\n")[0]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seq-length", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True, help="JSON lines with a field `question`")
    parser.add_argument("--answers", type=int, default=3, help="how many of them are answered (default: 3)")
    parser.add_argument("folders", nargs="+", metavar="NAME=DIR")
    options = parser.parse_args()
    lines = options.questions.read_text().splitlines()[: options.answers]
    questions = [json.loads(line)["question"] for line in lines]
    report = {}
    for item in options.folders:
        name, _, folder = item.partition("=")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        report[name] = {
            "loss": {
                f"{source}_valid_text_document": loss(
                    model, samples(options.data / f"{source}_valid_text_document", options.seq_length)
                )
                for source in ("domain", "general")
            },
            "answers": answers(Path(folder), model, questions),
        }
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
