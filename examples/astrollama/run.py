"""AstroLLaMA, scaled down: continued pre-training by LoRA and of all weights, judged by more than perplexity.

    python examples/astrollama/run.py [--output astrollama_out]

README.md in this folder says what is compared.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.astrollama.report import MODELS, write_report  # noqa: E402
from examples.steps import REPLACES, Steps, replace_output  # noqa: E402

HERE = "examples/astrollama"
MODEL = "configs/tiny/model.yml"
TRAINED = MODELS[1:]
SOURCES = ("domain", "general")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("astrollama_out"), help=REPLACES)
    parser.add_argument("--base-steps", type=int, default=150, help="training steps of the stand-in base model")
    parser.add_argument("--steps", type=int, default=200, help="training steps of the adapter, and of all weights")
    parser.add_argument("--documents", type=int, default=150, help="held-out documents of each kind, and questions")
    options = parser.parse_args()
    replace_output(ROOT / options.output, parser)
    start = time.monotonic()
    run = Run(options)
    run.texts()
    run.base()
    run.train()
    run.evaluate()
    run.merge()
    run.title("what was shown")
    print(write_report(ROOT / options.output))
    print(f"the whole run took {time.monotonic() - start:.0f} s; {options.output}/report.md and report.png keep this")
    return 0


class Run(Steps):
    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.out, self.options = options.output, options

    def texts(self) -> None:
        out = self.out
        self.title("astronomy, general text, a tokenizer, and questions from held-out texts")
        self.python("examples/demo_data.py", "--output", out)
        for name in [f"{source}_{part}" for source in SOURCES for part in ("train", "valid")]:
            self.python(
                *("tools/datasets/preprocess_data.py", "--input", out / f"text/{name}.jsonl"),
                *("--output-prefix", out / f"data/{name}", "--vocab-file", out / "tokenizer/tokenizer.json"),
                *("--tokenizer-type", "HFTokenizer", "--prepend-bos", "--append-eod", "--workers", 2),
            )
        for source in SOURCES:
            lines = (ROOT / out / f"text/{source}_valid.jsonl").read_text().splitlines()
            (ROOT / out / f"{source}.jsonl").write_text("\n".join(lines[: self.options.documents]) + "\n")
        self.python(
            *(f"{HERE}/questions.py", "--text", out / "text/domain_valid.jsonl"),
            *("--output", out / "questions.jsonl", "--most", self.options.documents),
        )

    def base(self) -> None:
        out = self.out
        self.title("a small Llama-3.1 trained mostly on general text, in place of the gated weights")
        general, domain = out / "text/general_train.jsonl", out / "text/domain_train.jsonl"
        self.python(
            *("examples/demo_base_model.py", "--tokenizer", out / "tokenizer", "--output", out / "hf_base"),
            *("--text", general, general, general, domain, "--steps", self.options.base_steps),
        )
        convert = ("tools/convert_hf", "to-neox", "--input", out / "hf_base", "--output", out / "neox_base")
        self.python(*convert, "--tp", 1, "--vocab-divisible-by", 1, "--quiet")

    def train(self) -> None:
        for name, what in zip(
            TRAINED, ("train an adapter on frozen weights", "train all weights, on the same tokens"), strict=True
        ):
            self.title(what)
            steps = self.options.steps
            self.deepy("train.py", name, "--train_iters", steps, "--checkpoint_factor", steps)

    def evaluate(self) -> None:
        out = self.out
        self.title("before and after: loss of each document, multiple choice, retrieval of document halves")
        self.python("-m", "tools.probe", "halves", out / "domain.jsonl", out / "halves.jsonl", "--min-words", 4)
        for name in MODELS:
            words = self.weights(name)
            (ROOT / out / f"eval_{name}").mkdir()
            documents = f"[{out}/domain.jsonl, {out}/general.jsonl]"
            prefix = ("--eval_results_prefix", f"{out}/eval_{name}/")
            self.deepy("eval.py", name, *words, "--eval_documents", documents, *prefix)
            items = ("--mcq.items", out / "questions.jsonl", "--mcq.method", "text", "--seq_length", 512)
            self.deepy("mcq.py", name, *words, *items, "--mcq.output", out / f"mcq_{name}")
            embed = ("--embed.input", out / "halves.jsonl", "--embed.output", out / f"vectors/{name}.npy")
            self.deepy("embed.py", name, *words, *embed, "--embed.cut_long_texts", "true")
        vectors = [f"{name}={out}/vectors/{name}.npy" for name in MODELS]
        picture = ("--output", out / "retrieval.json", "--picture", out / "retrieval.png")
        self.python("-m", "tools.probe", "retrieval", *vectors, *picture)

    def merge(self) -> None:
        out = self.out
        self.title("merge the adapter into Hugging Face weights; how much of it rounding to bf16 loses")
        words = ("tools/convert_hf", "to-hf", "--input", out / "hf_base", "--adapter", out / "lora", "--quiet")
        self.python(*words, "--output", out / "hf_merged", "--dtype", "bf16")

    def weights(self, name: str) -> tuple[object, ...]:
        """Options that select a model to evaluate."""
        out = self.out
        return {
            "base": (),
            "lora": ("--lora", f"{{load: {out}/lora}}"),
            "full": ("--load", out / "full"),
        }[name]

    def deepy(self, script: str, name: str, *arguments: object) -> None:
        files = [MODEL, self.yml("train")]
        if script == "train.py":
            files.append(self.yml(name))
        else:
            arguments = ("--pipe_parallel_size", 1, "--num_gpus", 1, "--save", "null", *arguments)
        self.python("deepy.py", script, *files, *arguments)

    def yml(self, name: str) -> Path:
        """The run file of that name, with its paths in this run's folder."""
        path = Path(HERE, f"{name}.yml")
        if str(self.out) == "astrollama_out":
            return path
        moved = self.out / "yml" / path.name
        (ROOT / moved).parent.mkdir(exist_ok=True)
        (ROOT / moved).write_text((ROOT / path).read_text().replace("astrollama_out", str(self.out)))
        return moved


if __name__ == "__main__":
    sys.exit(main())
