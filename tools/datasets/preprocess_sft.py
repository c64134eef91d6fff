"""Conversations -> tokens and labels for supervised fine-tuning, with Llama 3's chat format.

    python tools/datasets/preprocess_sft.py --output-prefix data/sft --tokenizer-type HFTokenizer \\
        --vocab-file Meta-Llama-3.1-8B/tokenizer.json \\
        --source reasoning:0.418=nemotron.jsonl --source astronomy:0.308=astro.jsonl --source general:0.274=hermes.jsonl

writes `data/sft_reasoning_document.{bin,idx,json}` and `data/sft_reasoning_label_document.{bin,idx}` and so on, and
`data/sft_train.yml`, the keys for training on them in these shares. Only the assistant's text and the token that ends
its turn are learned. Conversations that occurred before, in any source, are skipped and counted. A table at the end
accounts for the records of each source; it is also kept in the header of the data.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--source",
        action="append",
        required=True,
        metavar="NAME[:SHARE]=FILES",
        help="a source, its share of the mix, and its files (JSON lines or lists, .gz, .zst, Parquet; globs, folders)",
    )
    p.add_argument("--output-prefix", required=True)
    p.add_argument("--tokenizer-type", required=True, help="HFTokenizer or TiktokenTokenizer")
    p.add_argument("--vocab-file", required=True, help="tokenizer.json or tokenizer.model, or the folder it is in")
    p.add_argument("--train-on", choices=["all", "last"], default="all", help="which assistant turns are learned")
    p.add_argument(
        "--chat-template",
        help="Jinja template to use instead of Meta's format for Llama 3: a model folder, a tokenizer_config.json, a "
        "Jinja file, or llama3.1, llama3.2, llama3.3",
    )
    p.add_argument("--template-arguments", metavar="JSON", help="variables of the template, such as a date_string")
    p.add_argument("--seq-length", type=int, help="of the run: count conversations longer than a sample")
    p.add_argument(
        "--thinking-prompt",
        action="store_true",
        help="give conversations without a system turn 'detailed thinking on' if they have <think>, else '... off'",
    )
    p.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)")
    p.add_argument(
        "--log-interval", type=int, help="conversations between progress lines (default: one every ten seconds)"
    )
    p.add_argument("--on-bad-record", choices=["fatal", "skip"], default="fatal", help="stop, or skip and count")
    return p


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    from megatron.common.boundary import guarded
    from tools.datasets.encoding.sft import preprocess_conversations

    return guarded(
        "preprocess_sft.py", lambda: preprocess_conversations(options), "stopped; the same command continues from here"
    )


if __name__ == "__main__":
    sys.exit(main())
