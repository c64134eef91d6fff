"""AstroSage-70B's data and training, in small: raw text to a chat model, every step a command, every step a number.

    python examples/astrosage/run.py [--output astrosage_out]

README.md beside this file tells the story in the same order.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.astrosage.report import write_report  # noqa: E402
from examples.steps import Steps  # noqa: E402

HERE = "examples/astrosage"
MODEL = "configs/tiny/model.yml"
MADE = ("raw", "clean", "data", "sft", "tokenizer", "hf_base", "neox_base", "cpt", "sft_model", "hf_sft", "logs", "yml")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("astrosage_out"), help="an earlier run's files go")
    parser.add_argument("--share", type=float, default=0.6, help="of the astronomy texts")
    parser.add_argument("--base-steps", type=int, default=220, help="training steps of the stand-in base model")
    parser.add_argument("--cpt-epochs", type=float, default=2.5)
    parser.add_argument("--conversations", type=int, default=1500, help="of each of the three sets")
    options = parser.parse_args()
    out = options.output
    for name in MADE:
        shutil.rmtree(ROOT / out / name, ignore_errors=True)
    start = time.monotonic()
    run = Run(out, options)
    run.clean()
    run.tokenize()
    run.pretrain()
    run.converse()
    run.finetune()
    run.export()
    run.title("what was shown")
    print(write_report(ROOT / out, {name: [MODEL, run.yml(name), f"{HERE}/local.yml"] for name in ("cpt", "sft")}))
    print(f"\nthe whole run took {time.monotonic() - start:.0f} s; {out}/report.md keeps this")
    return 0


class Run(Steps):
    def __init__(self, out: Path, options: argparse.Namespace) -> None:
        super().__init__()
        self.out, self.options = out, options
        self.tokenizer = ("--tokenizer-type", "HFTokenizer", "--vocab-file", out / "tokenizer/tokenizer.json")

    def clean(self) -> None:
        out = self.out
        self.title("raw text: astronomy as OCR leaves it, general text, a tokenizer")
        self.python(f"{HERE}/raw_text.py", "--output", out, "--share", self.options.share)
        self.title("clean: the general text first, then the astronomy, with an n-gram of the general text to judge it")
        command = "tools/datasets/clean_corpus.py"
        self.python(command, "--input", out / "raw/general.jsonl.zst", "--output", out / "clean/general.jsonl")
        self.python(
            *("tools/datasets/train_ngram.py", "--input", out / "clean/general.jsonl"),
            *("--output", out / "clean/general.arpa"),
        )
        self.python(
            *(command, "--input", out / "raw/astronomy.jsonl.zst", "--output", out / "clean/astronomy.jsonl"),
            *("--perplexity-model", out / "clean/general.arpa", "--rules", f"{HERE}/rules.yml"),
        )

    def tokenize(self) -> None:
        out = self.out
        self.title("tokenize, with a begin and an end token around every document")
        for name, source in (
            ("astronomy", "clean/astronomy.jsonl"),
            ("general", "clean/general.jsonl"),
            ("astronomy_valid", "raw/astronomy_valid.jsonl"),
            ("general_valid", "raw/general_valid.jsonl"),
        ):
            self.python(
                *("tools/datasets/preprocess_data.py", "--input", out / source, "--output-prefix", out / "data" / name),
                *(*self.tokenizer, "--prepend-bos", "--append-eod"),
            )
        self.python(
            *("tools/datasets/inspect_data.py", out / "data/astronomy_text_document", "--samples", 0),
            *("--vocab-file", out / "tokenizer/tokenizer.json", "--histogram", out / "lengths.png"),
        )

    def pretrain(self) -> None:
        out = self.out
        self.title("a small Llama-3.1 that has read mostly general text, in place of the gated weights")
        general, astronomy = out / "clean/general.jsonl", out / "clean/astronomy.jsonl"
        self.python(
            *("examples/demo_base_model.py", "--tokenizer", out / "tokenizer", "--output", out / "hf_base"),
            *("--text", general, general, general, astronomy, "--steps", self.options.base_steps),
        )
        self.convert("to-neox", "hf_base", "neox_base", "--tp", 1, "--vocab-divisible-by", 1)
        self.title("continued pre-training: the domain, a fifth of replay, fresh in every epoch")
        self.python("tools/datasets/build_indices.py", MODEL, self.yml("cpt"), f"{HERE}/local.yml")
        self.deepy("train.py", "cpt")

    def converse(self) -> None:
        out, options = self.out, self.options
        self.title("conversations: three sets in three shapes, only the assistant's words learned")
        self.python(f"{HERE}/conversations.py", "--output", out, "--count", options.conversations)
        command = ("tools/datasets/preprocess_sft.py", *self.tokenizer, "--thinking-prompt")
        self.python(
            *(*command, "--output-prefix", out / "data/sft"),
            *("--source", f"reasoning:0.418={out}/sft/reasoning.jsonl"),
            *("--source", f"astronomy:0.308={out}/sft/astronomy.jsonl"),
            *("--source", f"general:0.274={out}/sft/general.jsonl"),
        )
        self.python(
            *(*command, "--output-prefix", out / "data/sft_valid"),
            *("--source", f"astronomy={out}/sft/valid_astronomy.jsonl"),
        )
        self.python(
            *("tools/datasets/inspect_data.py", out / "data/sft_reasoning_document", "--show-mask"),
            *("--vocab-file", out / "tokenizer/tokenizer.json", "--samples", 2),
        )

    def finetune(self) -> None:
        self.title("supervised fine-tuning: 0.6 of an epoch, no weight decay")
        self.deepy("train.py", "sft")

    def export(self) -> None:
        out = self.out
        self.title("to Hugging Face, and the losses once more by transformers")
        self.convert("to-hf", "cpt", "hf_cpt")
        self.convert("to-hf", "sft_model", "hf_sft")
        stages = {"base": "neox_base", "cpt": "cpt", "sft": "sft_model"}
        for name, folder in stages.items():
            for yml in ("cpt", "sft"):
                self.deepy(
                    *("eval.py", yml, "--load", out / folder, "--precision", "fp32"),
                    *("--eval_results_prefix", out / f"logs/{name}_{yml}_"),
                )
        self.python(
            *(f"{HERE}/check.py", "--data", out / "data", "--seq-length", 256, "--output", out / "check.json"),
            *(f"{name}={out}/hf_{name}" for name in stages),
        )

    def convert(self, way: str, source: str, target: str, *arguments: object) -> None:
        words = ("--input", self.out / source, "--output", self.out / target, *arguments, "--quiet")
        self.python("tools/convert_hf", way, *words)

    def deepy(self, script: str, yml: str, *arguments: object) -> None:
        self.python("deepy.py", script, MODEL, self.yml(yml), f"{HERE}/local.yml", *arguments)

    def yml(self, name: str) -> str:
        """The run file; for another output folder or fewer epochs a copy that says so."""
        text = (ROOT / HERE / f"{name}.yml").read_text()
        changed = text.replace("astrosage_out", str(self.out))
        if name == "cpt":
            changed = changed.replace("train_epochs: 2.5", f"train_epochs: {self.options.cpt_epochs}")
        if changed == text:
            return f"{HERE}/{name}.yml"
        copy = ROOT / self.out / "yml" / f"{name}.yml"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(changed)
        return str(copy)


if __name__ == "__main__":
    sys.exit(main())
