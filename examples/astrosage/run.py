"""A scaled-down AstroSage, end to end, from facts to a merged chat model; every step is a command and is measured.

    python examples/astrosage/run.py [--output astrosage_out] [--seed 0]

README.md in this folder explains the steps in order; docs/astrosage.md has the numbers of three seeds.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.astrosage.results import write_results  # noqa: E402
from examples.steps import REPLACES, Steps, replace_output  # noqa: E402

HERE = "examples/astrosage"
MODEL = f"{HERE}/model.yml"
SIZES: dict[str, dict[str, tuple[object, ...]]] = {  # options of the scripts by size of a run; whole: their defaults
    "whole": {"documents": (), "base": (), "conversations": ()},
    "short": {
        "documents": ("--objects", 30, 80, 60),
        "base": ("--steps", 1700, "--instruct-steps", 60),
        "conversations": ("--count", 700),
    },
    "tiny": {
        "documents": ("--objects", 6, 12, 10),
        "base": ("--steps", 120, "--instruct-steps", 10),
        "conversations": ("--count", 100),
    },
}
# Models to test: name of the results, checkpoint, run file, whether to ask in a conversation.
ASKED = (
    ("base", "neox_base", "cpt", False),
    ("cpt", "cpt", "cpt", False),
    ("lora", "lora", "cpt", False),
    ("sft", "sft_model", "sft", True),
    ("merge", "merged", "sft", True),
    ("merge_own_base", "merged_own_base", "sft", True),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("astrosage_out"), help=REPLACES)
    parser.add_argument("--seed", type=int, default=0, help="seed of facts, wordings, weights and orders")
    sizes = "short: fewer facts and steps; tiny: too few to learn"
    parser.add_argument("--size", choices=list(SIZES), default="whole", help=sizes)
    parser.add_argument("--until", choices=["cpt", "end"], default="end", help="cpt: only pre-training and its test")
    options = parser.parse_args()
    out = options.output
    replace_output(ROOT / out, parser)
    start = time.monotonic()
    run = Run(out, options.seed, options.size)
    run.prepare()
    run.pretrain(instruct=options.until == "end")
    if options.until == "end":
        run.adapt()
        run.converse()
        run.finetune()
        run.merge()
    run.ask()
    run.complete()
    if options.until == "end":
        run.chat()
    run.export()
    if options.until == "end":
        run.release()
    run.title("what was shown")
    run.python("tools/report", out, "--topic", "held", "--title", "A scaled-down AstroSage")
    print(write_results(ROOT / out, seconds=time.monotonic() - start, seed=options.seed))
    print(f"\nthe whole run took {time.monotonic() - start:.0f} s; {out}/results.json and {out}/results.md keep this")
    return 0


class Run(Steps):
    def __init__(self, out: Path, seed: int, size: str) -> None:
        super().__init__()
        self.out, self.seed, self.size = out, seed, SIZES[size]
        self.tokenizer = ("--tokenizer-type", "HFTokenizer", "--vocab-file", out / "tokenizer/tokenizer.json")

    # --- data

    def prepare(self) -> None:
        """Write documents and questions, clean, check for contamination, tokenize."""
        out = self.out
        self.title("facts in documents with OCR damage, and the questions of the test")
        made = ("--output", out, "--seed", self.seed)
        self.python(f"{HERE}/documents.py", *made, *self.size["documents"])
        self.title("clean")
        self.python(
            *("tools/datasets/clean_corpus.py", "--input", out / "raw/astronomy.jsonl.zst"),
            *("--output", out / "clean/astronomy.jsonl", "--rules", f"{HERE}/rules.yml"),
        )
        self.title("do the documents contain the test?")
        self.python(
            *("tools/datasets/decontaminate.py", "--benchmark", out / "questions.jsonl"),
            *("--input", out / "clean/astronomy.jsonl", "--report", out / "contamination", "--threshold", 0.8),
        )
        self.title("tokenize, with a begin and an end token around every document")
        for name, source in (
            ("astronomy", "clean/astronomy.jsonl"),
            ("general", "raw/general.jsonl.zst"),
            ("astronomy_valid", "raw/astronomy_valid.jsonl"),
            ("general_valid", "raw/general_valid.jsonl"),
        ):
            self.python(
                *("tools/datasets/preprocess_data.py", "--input", out / source, "--output-prefix", out / "data" / name),
                *(*self.tokenizer, "--prepend-bos", "--append-eod"),
            )

    def converse(self) -> None:
        out = self.out
        self.title("conversations: three sets in three formats; only the assistant's words are learned")
        made = ("--output", out, "--seed", self.seed)
        self.python(f"{HERE}/conversations.py", *made, *self.size["conversations"])
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

    # --- training

    def pretrain(self, instruct: bool) -> None:
        out = self.out
        base = self.size["base"] if instruct else (*self.size["base"], "--instruct", 0)
        self.title("stand-ins for the gated weights: a base model, and three instruct models fine-tuned from it")
        self.python(f"{HERE}/base_models.py", "--output", out, "--seed", self.seed, *base)
        self.convert("to-neox", "hf_base", "neox_base", "--tp", 1, "--vocab-divisible-by", 1)
        self.title("continued pre-training: 2.5 passes over the domain, a fifth of replay, new in every pass")
        self.python("tools/datasets/build_indices.py", MODEL, self.yml("cpt"), f"{HERE}/local.yml")
        self.deepy("train.py", "cpt")

    def adapt(self) -> None:
        out = self.out
        self.title("the same pre-training, at lower cost, of an adapter on the frozen base")
        adapter = ("--lora", "{rank: 16, alpha: 32}", "--finetune", "null", "--optimizer.params.lr", 4e-3)
        self.deepy("train.py", "cpt", *adapter, "--save", out / "lora", "--log_dir", "null")

    def finetune(self) -> None:
        self.title("supervised fine-tuning: 0.6 of a pass, no weight decay")
        self.deepy("train.py", "sft")

    def merge(self) -> None:
        self.title("merge: 70 % of the fine-tune, 30 % of instruct models")
        for name, recipe in (("merged", "merge"), ("merged_own_base", "merge_own_base")):
            self.python("tools/merge", self.yml(recipe), "--output", self.out / name, "--tp", 1, "--quiet")

    # --- evaluation and release

    def ask(self) -> None:
        out = self.out
        self.title("the test after every stage: facts told, facts never told, general facts")
        asked = [one for one in ASKED if (ROOT / out / one[1]).exists()]
        for name, folder, yml, chat in asked:
            before = () if name == "base" else ("--mcq.compare_with", out / "mcq/base/items.jsonl")
            self.mcq(name, folder, yml, chat, *before)
        self.title("the same test of the same checkpoint on two tensor-parallel ranks")
        self.mcq("cpt_tp2", "cpt", "cpt", False, "--model_parallel_size", 2, "--num_gpus", 2)

    def mcq(self, name: str, folder: str, yml: str, chat: bool, *more: object) -> None:
        out = self.out
        style = ("--chat", "true", "--thinking", "off") if chat else ()
        adapter = folder == "lora"
        model = ("--load", out / "neox_base", "--lora.load", out / "lora") if adapter else ("--load", out / folder)
        self.deepy(
            *("mcq.py", yml, *model, "--mcq.items", out / "questions.jsonl", "--mcq.method", "text"),
            *("--mcq.topic_field", "topic", "--mcq.output", out / "mcq" / name, *style, *more),
            *("--train_micro_batch_size_per_gpu", 32),
        )

    def complete(self) -> None:
        out = self.out
        self.title("complete sentences from the documents")
        generate = ("--load", out / "cpt", "--maximum_tokens", 16)
        self.deepy("generate.py", "cpt", *generate, "-i", out / "completions.jsonl", "-o", out / "completed.jsonl")

    def chat(self) -> None:
        out = self.out
        self.title("chat with the merged model, thinking off and on")
        chat = ("--load", out / "merged", "--chat", "-i", out / "chat.jsonl", "--maximum_tokens", 60)
        for thinking in ("off", "on"):
            self.deepy("generate.py", "sft", *chat, "--thinking", thinking, "-o", out / f"chat_{thinking}.jsonl")

    def export(self) -> None:
        out = self.out
        self.title("export to Hugging Face, and repeat the test with transformers")
        checked = []
        for name, source, style in (("cpt", "cpt", "plain"), ("merge", "merged", "chat")):
            if (ROOT / out / source).exists():
                self.convert("to-hf", source, f"hf_{name}")
                checked.append(f"{name}={out}/hf_{name}:{style}:{out}/mcq/{name}")
        self.python(
            *(f"{HERE}/check.py", "--questions", out / "questions.jsonl", "--output", out / "check.json", *checked)
        )

    def release(self) -> None:
        out = self.out
        self.title("a release, and its verification")
        self.python("tools/release", "make", self.yml("release"), "--output", out / "release")
        self.python("tools/release", "verify", out / "release", "--data", out / "data")

    # --- commands

    def convert(self, way: str, source: str, target: str, *arguments: object) -> None:
        words = ("--input", self.out / source, "--output", self.out / target, *arguments, "--quiet")
        self.python("tools/convert_hf", way, *words)

    def deepy(self, script: str, yml: str, *arguments: object) -> None:
        self.python("deepy.py", script, MODEL, self.yml(yml), f"{HERE}/local.yml", *arguments)

    def yml(self, name: str) -> str:
        """The run file or recipe; for another output folder or seed a copy that says so."""
        text = (ROOT / HERE / f"{name}.yml").read_text()
        changed = text.replace("astrosage_out", str(self.out)).replace("seed: 1234", f"seed: {1234 + self.seed}")
        if changed == text:
            return f"{HERE}/{name}.yml"
        copy = ROOT / self.out / "yml" / f"{name}.yml"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(changed)
        return str(copy)


if __name__ == "__main__":
    sys.exit(main())
