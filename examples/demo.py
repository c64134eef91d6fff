"""The whole workflow on one machine: Hugging Face -> NeoX -> TP2 x PP2 x DP2 training -> Hugging Face, with checks.

    python examples/demo.py [--output demo_out] [--iterations 200]

Every step is a command that you could type; this script prints it, runs it, and reads its output. If you have the gated
weights, skip steps 1 to 3 and give their folder to `convert_hf`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from examples import demo_answers  # noqa: E402
from examples.steps import REPLACES, Steps, replace_output  # noqa: E402

PARITY = 1e-5
CONFIGS = ["configs/tiny/model.yml", "configs/tiny/run.yml", "configs/tiny/local.yml"]
SOURCES = ("domain", "general")
LENGTH = 128  # tokens in a sample: documents are short, and many small steps train better than a few large ones
LEARNING = ("--gradient_accumulation_steps", 2, "--optimizer.params.lr", 2e-3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_out"), help=REPLACES)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--base-steps", type=int, default=200, help="training steps of the stand-in base model")
    options = parser.parse_args()
    os.chdir(ROOT)
    replace_output(options.output, parser)  # .gitignore keeps demo_out out of commits
    demo = Demo(options.output, options.iterations, options.base_steps)
    start = time.monotonic()
    demo.run()
    print(f"\nthe whole demo took {time.monotonic() - start:.0f} s")
    return 0


class Demo(Steps):
    def __init__(self, out: Path, iterations: int, base_steps: int) -> None:
        super().__init__()
        self.out, self.iterations, self.base_steps = out, iterations, base_steps

    def run(self) -> None:
        out = self.out
        self.title("checkable facts, real text, and a tokenizer")
        self.python("examples/demo_facts.py", "--output", out)
        self.title("tokenize the documents")
        for name in [f"{source}_{part}" for source in SOURCES for part in ("train", "valid")]:
            self.python(
                *("tools/datasets/preprocess_data.py", "--input", out / f"text/{name}.jsonl"),
                *("--output-prefix", out / f"data/{name}", "--vocab-file", out / "tokenizer/tokenizer.json"),
                *("--tokenizer-type", "HFTokenizer", "--prepend-bos", "--append-eod", "--workers", 2),
            )
        self.title("a small Llama-3.1 from transformers, in place of the gated weights")
        self.python(
            *("examples/demo_base_model.py", "--tokenizer", out / "tokenizer"),
            *("--text", out / "text/general_train.jsonl", "--length", LENGTH),
            *("--output", out / "hf_base", "--steps", self.base_steps),
        )
        self.title("Hugging Face -> NeoX at TP=2")
        convert = ("tools/convert_hf", "to-neox", "--input", out / "hf_base", "--output", out / "neox_start")
        self.python(*convert, "--tp", 2, "--vocab-divisible-by", 1, "--quiet")
        self.title("questions about facts that the model has not read")
        self.ask("before", "neox_start")
        self.title("continued pre-training: 2 tensor x 2 pipeline x 2 data-parallel processes")
        self.deepy("train.py", "--train_iters", self.iterations, *LEARNING)
        self.title("the same questions again")
        self.ask("after", "checkpoints")
        self.title("NeoX -> Hugging Face")
        self.python(
            *("tools/convert_hf", "to-hf", "--input", out / "checkpoints", "--output", out / "hf_trained", "--quiet")
        )
        self.title("the same validation loss by this project and by transformers, both in fp32")
        for name, folder in (("before", "neox_start"), ("after", "checkpoints")):
            self.deepy(
                *("eval.py", "--precision", "fp32", "--load", out / folder),
                *("--eval_results_prefix", out / f"{name}_"),
            )
        self.python(
            *("examples/demo_check.py", "--data", out / "data", "--seq-length", LENGTH, "--output", out / "check.json"),
            *("--questions", out / "questions.jsonl"),
            *("before=" + str(out / "hf_base"), "after=" + str(out / "hf_trained")),
        )
        self.report()

    def ask(self, when: str, folder: str) -> None:
        """Ask the questions on two tensor-parallel ranks, like the checkpoint's; its pipeline does not matter."""
        out = self.out
        self.deepy(
            *("mcq.py", "--load", out / folder, "--pipe_parallel_size", 1, "--num_gpus", 2),
            *("--mcq.items", out / "questions.jsonl", "--mcq.method", "text", "--mcq.topic_field", "topic"),
            *("--train_micro_batch_size_per_gpu", 32, "--mcq.output", out / "mcq" / when),
        )

    def deepy(self, script: str, *arguments: object) -> None:
        self.python("deepy.py", script, *CONFIGS, *self.paths(script), "--seq_length", LENGTH, *arguments)

    def paths(self, script: str) -> list[str]:
        """Options that move the paths of configs/tiny/run.yml to this demo's folder."""
        inputs, words = ["vocab_file", "valid_data_paths", "train_data_paths"], []
        if script == "train.py":
            inputs.append("load")
            for key, name in (("save", "checkpoints"), ("log_dir", "logs"), ("tensorboard_dir", "tensorboard")):
                words += [f"--{key}", str(self.out / name)]
        if str(self.out) == "demo_out":  # the configuration's own inputs
            return words
        text = (ROOT / CONFIGS[1]).read_text()
        for key in inputs:
            value = re.search(rf"^{key}: (.*)$", text, re.MULTILINE)
            assert value is not None, f"{CONFIGS[1]} has no {key}"
            words += [f"--{key}", value[1].replace("demo_out", str(self.out))]
        return words

    def report(self) -> None:
        """Print the results from the files of the steps; the demo fails if the losses differ from transformers'."""
        records = [json.loads(line) for line in (self.out / "logs/metrics.jsonl").read_text().splitlines()]
        training = [r for r in records if "train/lm_loss" in r]
        theirs = json.loads((self.out / "check.json").read_text())
        plot(records, self.out / "loss.png")
        self.title("what was shown")
        first, last = training[0], training[-1]
        print(
            f"training loss      {first['train/lm_loss']:.4f} at step {first['iteration']}, "
            f"{last['train/lm_loss']:.4f} at step {last['iteration']} ({self.out / 'loss.png'})"
        )
        worst = 0.0
        for when in ("before", "after"):
            ours = json.loads((self.out / f"{when}_eval_results.json").read_text())["results"]
            for name, result in ours.items():
                difference = abs(result["loss"] - theirs[when]["loss"][name])
                worst = max(worst, difference)
                print(
                    f"{name:<11} {when:<6} eval.py {result['loss']:.6f}   transformers "
                    f"{theirs[when]['loss'][name]:.6f}   difference {difference:.1e}"
                )
        print(f"parity             largest difference {worst:.1e}, bound {PARITY:.0e}")
        print(f"export             {self.out / 'hf_trained'}; the answers below are its own, by transformers")
        written = {when: theirs[when]["answers"] for when in ("before", "after")}
        print("\n".join(demo_answers.report(self.out, written)))
        if not worst < PARITY or not math.isfinite(worst):
            raise SystemExit(f"demo: eval.py and transformers differ by {worst:.1e}, more than {PARITY:.0e}")


def plot(records: list[dict], path: Path) -> None:
    """Training and validation loss over iterations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    training = [(r["iteration"], r["train/lm_loss"]) for r in records if "train/lm_loss" in r]
    axes.plot(*zip(*training, strict=True), color="0.6", linewidth=1, label="training")
    names = sorted({key for record in records for key in record if re.fullmatch(r"validation/.*/lm_loss", key)})
    for name in names:
        points = [(r["iteration"], r[name]) for r in records if name in r]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name.split("/")[1] + " (validation)")
    axes.set(xlabel="iteration", ylabel="loss, nats per token", title="Continued pre-training of a small Llama-3.1")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
