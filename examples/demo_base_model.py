"""The demo's stand-in for Meta-Llama-3.1: a small Hugging Face Llama, trained for half a minute.

    python examples/demo_base_model.py --tokenizer demo_out/tokenizer --output demo_out/hf_base \
        --text demo_out/text/general_train.jsonl --length 128

If there are several texts, each step takes its batch from the next one in turn.

The model is made with `transformers` alone, so that everything this project does to it is checked against independent
code. It must have learned something: a continued run that starts at the loss of a random model is refused.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from examples.fitting import fit  # noqa: E402


def config_of(model_yml: Path, tokenizer: AutoTokenizer) -> LlamaConfig:
    """The Hugging Face config of a NeoX model file, so that the demo's sizes are written in one place."""
    keys = yaml.safe_load(model_yml.read_text())
    return LlamaConfig(
        hidden_size=keys["hidden_size"],
        num_hidden_layers=keys["num_layers"],
        num_attention_heads=keys["num_attention_heads"],
        num_key_value_heads=keys["num_kv_heads"],
        intermediate_size=keys["intermediate_size"],
        vocab_size=keys["vocab_size"],
        max_position_embeddings=keys["max_position_embeddings"],
        rms_norm_eps=keys["rms_norm_epsilon"],
        rope_parameters={**keys["rope_scaling"], "rope_theta": float(keys["rotary_emb_base"])},
        tie_word_embeddings=False,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|begin_of_text|>"),
        eos_token_id=tokenizer.convert_tokens_to_ids("<|end_of_text|>"),
    )


def token_stream(text: Path, tokenizer: AutoTokenizer) -> torch.Tensor:
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    random.Random(0).shuffle(documents)
    ids: list[int] = []
    for document in documents:
        ids += [*tokenizer(document, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return torch.tensor(ids)


def batches(streams: list[torch.Tensor], steps: int, length: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of eight rows of `length` tokens, from each stream in turn; every token has a label."""
    for step in range(steps):
        stream = streams[step % len(streams)]
        starts = torch.randint(len(stream) - length - 1, (8,))
        batch = torch.stack([stream[start : start + length] for start in starts])
        yield batch, batch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="JSON lines with a field `text`")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=ROOT / "configs/tiny/model.yml")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--length", type=int, default=256, help="tokens per row; a batch has eight rows")
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    model = LlamaForCausalLM(config_of(options.model, tokenizer)).train()
    streams = [token_stream(text, tokenizer) for text in options.text]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=options.steps, pct_start=0.1)
    rows = batches(streams, options.steps, options.length)
    loss = fit(model, rows, optimizer, schedule, steps=options.steps, name="base model")
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"{options.output}: {model.num_parameters():,} parameters, last training loss {loss:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
