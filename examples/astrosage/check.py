"""Repeats the test with `transformers`: compares the log-probability of every option with that from mcq.py.

    python examples/astrosage/check.py --questions astrosage_out/questions.jsonl --output astrosage_out/check.json \
        cpt=astrosage_out/hf_cpt:plain:astrosage_out/mcq/cpt

Prompts are built independently, with the tokenizer and the chat template of the exported folder. This project's model,
tokenizer and evaluation are not used.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def prompt_of(question: str, style: str, tokenizer: Any) -> list[int]:
    """Token ids of everything before the answer."""
    if style == "plain":
        return list(tokenizer(f"Question: {question}\nAnswer:").input_ids)
    turns = [
        {"role": "system", "content": "detailed thinking off"},
        {"role": "user", "content": f"Question: {question}"},
    ]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


@torch.no_grad()
def sums(model: torch.nn.Module, prompt: list[int], options: list[list[int]]) -> list[float]:
    """Log-probability of each option as a continuation of the prompt."""
    rows = [prompt + option for option in options]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    logits: Tensor = model(input_ids=ids).logits.double().log_softmax(-1)
    begin = len(prompt) - 1
    return [
        sum(float(logits[i, begin + k, token]) for k, token in enumerate(option)) for i, option in enumerate(options)
    ]


def compare(folder: Path, style: str, mcq: Path, questions: list[dict[str, str]]) -> dict[str, Any]:
    """The largest difference of a score, and the numbers of questions with another answer or with other token ids."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    worst, other_choices, other_prompts = 0.0, 0, 0
    space = " " if style == "plain" else ""
    for question, line in zip(questions, (mcq / "items.jsonl").read_text().splitlines(), strict=True):
        item = json.loads(line)
        asked = item["asked"][0]
        prompt = prompt_of(question["question"], style, tokenizer)
        options = [tokenizer(space + question[letter], add_special_tokens=False).input_ids for letter in "ABCD"]
        other_prompts += prompt != asked["prompt_ids"] or options != asked["continuations"]
        theirs = sums(model, prompt, options)
        ours = [sum(one) for one in asked["log_probs"]]
        worst = max(worst, *(abs(a - b) for a, b in zip(ours, theirs, strict=True)))
        other_choices += item["choice"] != theirs.index(max(theirs))
    return {
        "questions": len(questions),
        "largest_difference": worst,
        "other_choices": other_choices,
        "other_prompts": other_prompts,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER:STYLE:MCQ", help="STYLE is plain or chat")
    options = parser.parse_args()
    questions = [json.loads(line) for line in options.questions.read_text().splitlines()]
    found = {}
    for model in options.models:
        name, _, rest = model.partition("=")
        folder, style, mcq = rest.split(":")
        found[name] = compare(Path(folder), style, Path(mcq), questions)
        print(f"{name}: {found[name]}")
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
