"""Losses of Hugging Face folders by `transformers`, in fp32: of plain text, and of what the assistant says.

    python examples/astrosage/check.py --data astrosage_out/data --seq-length 256 --output check.json base=DIR sft=DIR

Files are read with megatron-core's own `IndexedDataset`. Conversations are given to the model one at a time, which is
what `isolate_documents` promises of packed ones. Nothing of this project's model or data code takes part.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.demo_check import loss, samples  # noqa: E402

TEXTS = ("astronomy_valid_text_document", "general_valid_text_document")
CONVERSATIONS = "sft_valid_astronomy"
QUESTION = "What is SkyCoord for?"


@torch.no_grad()
def answer_loss(model: torch.nn.Module, prefix: str) -> float:
    """Mean over all learned tokens of all conversations."""
    texts, labels = (IndexedDataset(f"{prefix}{kind}_document") for kind in ("", "_label"))
    total, count = 0.0, 0
    for i in range(len(texts)):
        ids, wanted = (torch.from_numpy(part[i].astype("int64")) for part in (texts, labels))
        logits = model(input_ids=ids[None, :-1]).logits[0].double()
        total += F.cross_entropy(logits, wanted[1:], ignore_index=-100, reduction="sum").item()
        count += int((wanted[1:] >= 0).sum())
    return total / count


@torch.no_grad()
def answer(folder: Path, model: torch.nn.Module) -> str:
    """What the model says to QUESTION, by the chat template in its folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, eos_token_id=end, pad_token_id=end
    )
    return tokenizer.decode(written[0, ids.shape[1] :])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seq-length", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("folders", nargs="+", metavar="NAME=DIR")
    options = parser.parse_args()
    report = {}
    for item in options.folders:
        name, _, folder = item.partition("=")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        losses = {text: loss(model, samples(options.data / text, options.seq_length)) for text in TEXTS}
        losses[f"{CONVERSATIONS}_document"] = answer_loss(model, str(options.data / CONVERSATIONS))
        report[name] = {"loss": losses, "answer": answer(Path(folder), model)}
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
