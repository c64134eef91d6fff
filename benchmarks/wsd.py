"""One trunk with cooldowns at several lengths, compared with a cosine schedule of each length, on real text.

    python benchmarks/wsd.py --output wsd_out --seeds 0 1 2

The texts are those of examples/demo_data.py, and the base model reads both sources. For every seed the trunk trains at
a constant rate, and cooldowns branch off its checkpoints; each cosine run starts from the beginning. Two runs at the
same step read the same batches. Printed are the validation losses of both sources, and the total steps of each method.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = (120, 240, 360)
COOLDOWN = 0.2  # fraction of the length
WARMUP = 12
MODEL = "configs/tiny/model.yml"
SOURCES = ("domain", "general")


def python(*words: object) -> None:
    command = [str(word) for word in words]
    print("$ python " + shlex.join(command), flush=True)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])


def prepare(out: Path) -> None:
    """Texts, tokens and a base model."""
    python("examples/demo_data.py", "--output", out)
    for source in SOURCES:
        for part in ("train", "valid"):
            name = f"{source}_{part}"
            python(
                *("tools/datasets/preprocess_data.py", "--input", out / f"text/{name}.jsonl"),
                *("--output-prefix", out / f"data/{name}", "--vocab-file", out / "tokenizer/tokenizer.json"),
                *("--tokenizer-type", "HFTokenizer", "--prepend-bos", "--append-eod"),
            )
    texts = [out / f"text/{source}_train.jsonl" for source in ("general", "domain")]
    python(
        *("examples/demo_base_model.py", "--tokenizer", out / "tokenizer", "--output", out / "hf_base"),
        *("--steps", 150, "--text", *texts),
    )
    convert = ("tools/convert_hf", "to-neox", "--input", out / "hf_base", "--output", out / "neox", "--quiet")
    python(*convert, "--tp", 1, "--vocab-divisible-by", 1)


def train(out: Path, name: str, seed: int, iterations: int, *keys: object) -> dict[str, float]:
    """Train on one rank; returns the validation losses at the end."""
    folder = out / f"seed{seed}" / name
    python(
        *("deepy.py", "train.py", MODEL, "configs/tiny/run.yml", "configs/tiny/local.yml"),
        *("--num_gpus", 1, "--model_parallel_size", 1, "--pipe_parallel_size", 1, "--checkpoint_activations", "false"),
        *("--train_micro_batch_size_per_gpu", 4, "--gradient_accumulation_steps", 1, "--precision", "fp32"),
        *("--vocab_file", out / "tokenizer/tokenizer.json", "--seed", 1234 + seed, "--train_iters", iterations),
        *("--train_data_paths", json.dumps([f"{out}/data/{s}_train_text_document" for s in SOURCES])),
        *("--valid_data_paths", json.dumps([f"{out}/data/{s}_valid_text_document" for s in SOURCES])),
        *("--eval_interval", iterations, "--eval_iters", 1000, "--save", folder, "--log_dir", folder / "log"),
        *("--tensorboard_dir", "null", "--checkpoint_factor", 100000, "--keep_last_n_checkpoints", "null"),
        *keys,
    )
    records = [json.loads(line) for line in (folder / "log/metrics.jsonl").read_text().splitlines()]
    last = {key: value for record in records for key, value in record.items() if record["iteration"] == iterations}
    return {source: last[f"validation/{source}_valid_text_document/lm_loss"] for source in SOURCES}


def one_seed(out: Path, seed: int) -> dict[str, dict[str, float]]:
    """Losses by `cosine LENGTH` and `wsd LENGTH`."""
    found = {}
    start = ("--load", out / "neox", "--finetune", "true", "--warmup", "null", "--lr_warmup_iters", WARMUP)
    for length in LENGTHS:
        found[f"cosine {length}"] = train(out, f"cosine{length}", seed, length, *start, "--min_lr", 0.0)
    points = [round(length * (1 - COOLDOWN)) for length in LENGTHS]
    wsd = ("--warmup", "null", "--lr_warmup_iters", WARMUP, "--lr_decay_style", "wsd", "--min_lr", 0.0)
    trunk = ("--lr_wsd_decay_iters", 0, "--extra_save_iters", json.dumps(points), "--load", out / "neox")
    train(out, "trunk", seed, points[-1], *wsd, *trunk, "--finetune", "true")
    for length, point in zip(LENGTHS, points, strict=True):
        branch = ("--load", out / f"seed{seed}/trunk", "--iteration", point, "--finetune", "false")
        cooldown = ("--lr_wsd_decay_iters", length - point)
        found[f"wsd {length}"] = train(out, f"wsd{length}", seed, length, *wsd, *branch, *cooldown)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    out = options.output.resolve()
    if not (out / "neox").exists():
        prepare(out)
    results = {}
    for seed in options.seeds:
        path = out / f"seed{seed}.json"
        if not path.exists():
            losses = one_seed(out, seed)
            path.write_text(json.dumps(losses, indent=1) + "\n")
        results[seed] = json.loads(path.read_text())
    points = [round(length * (1 - COOLDOWN)) for length in LENGTHS]
    cooled = sum(length - point for length, point in zip(LENGTHS, points, strict=True))
    print("\n| steps | source | cosine | trunk and cooldown | difference, of each seed |\n|---|---|---|---|---|")
    for length in LENGTHS:
        for source in SOURCES:
            pairs = [(one[f"cosine {length}"][source], one[f"wsd {length}"][source]) for one in results.values()]
            means = [statistics.mean(values) for values in zip(*pairs, strict=True)]
            each = ", ".join(f"{b - a:+.4f}" for a, b in pairs)
            print(f"| {length} | {source} | {means[0]:.4f} | {means[1]:.4f} | {each} |")
    print(f"\nsteps: cosines {sum(LENGTHS)}, trunk {points[-1]} and cooldowns {cooled}: {points[-1] + cooled}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
