"""Three sizes, two seeds, cleaner images: validation loss and probe scores against the number of parameters.

    python examples/astropt/scaling.py [--output astropt_scaling]

The six points are drawn without a fitted power law: three sizes are too few. The two seeds show the scatter.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.astropt.galaxies import NAMES  # noqa: E402
from examples.steps import REPLACES, Steps, replace_output  # noqa: E402

HERE = "examples/astropt"
# (hidden_size, num_layers, intermediate_size, peak learning rate)
SIZES = ((32, 2, 88, 3.0e-3), (64, 3, 176, 2.0e-3), (128, 4, 344, 1.5e-3))
NOISE = 0.2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("astropt_scaling"), help=REPLACES)
    parser.add_argument("--train", type=int, default=4400, help="galaxies to train on")
    parser.add_argument("--probe", type=int, default=1600, help="further galaxies, to fit and test probes")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    replace_output(ROOT / options.output, parser)
    out, steps = options.output, Steps()
    steps.title("galaxies with a fifth of the noise")
    for name, count, first in (("train", options.train, 0), ("probe", options.probe, options.train)):
        words = ("--count", count, "--first", first, "--noise", NOISE, "--output", out / f"raw/{name}.npz")
        steps.python(f"{HERE}/galaxies.py", *words)
        words = ("--input", out / f"raw/{name}.npz", "--output-prefix", out / f"data/{name}")
        steps.python("tools/datasets/preprocess_images.py", *words)
    points = []
    for size in SIZES:
        for seed in options.seeds:
            points.append(_train_and_probe(steps, out, size, seed, options.steps))
    (ROOT / out / "scaling.json").write_text(json.dumps(points, indent=1) + "\n")
    draw(points, ROOT / out / "scaling.png")
    print(table(points))
    return 0


def _train_and_probe(
    steps: Steps, out: Path, size: tuple[int, int, int, float], seed: int, iterations: int
) -> dict[str, Any]:
    hidden, layers, width, rate = size
    run = out / f"d{hidden}_seed{seed}"
    steps.title(f"width {hidden}, {layers} layers, seed {seed}")
    steps.python(
        *("deepy.py", "train.py", f"{HERE}/train.yml", "--seed", seed, "--train_iters", iterations),
        *("--hidden_size", hidden, "--num_layers", layers, "--intermediate_size", width),
        *("--optimizer.params.lr", rate, "--min_lr", rate / 10, "--eval_interval", iterations, "--eval_iters", 50),
        *("--train_data_paths", f"[{out}/data/train]", "--valid_data_paths", f"[{out}/data/probe]"),
        *("--save", run / "checkpoints", "--log_dir", run / "logs"),
    )
    steps.python("tools/convert_hf", "to-hf", "--input", run / "checkpoints", "--output", run / "hf", "--quiet")
    steps.python(f"{HERE}/features.py", run / "hf", out / "data/probe", run / "vectors.npy")
    steps.python(
        *("-m", "tools.probe", "properties", "--trained", run / "vectors.npy", "--labels", out / "data/probe.parquet"),
        *("--targets", *NAMES, "--test-share", 0.5, "--output", run / "probe.json"),
    )
    lines = (ROOT / run / "logs/metrics.jsonl").read_text().splitlines()
    losses = [entry["validation/huber_loss"] for entry in map(json.loads, lines) if "validation/huber_loss" in entry]
    r2 = json.loads((ROOT / run / "probe.json").read_text())["mean_r2"]["trained"]
    from safetensors import safe_open

    with safe_open(ROOT / run / "hf/model.safetensors", "np") as file:
        parameters = sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118
    return {"hidden_size": hidden, "seed": seed, "parameters": parameters, "loss": losses[-1], "mean_r2": r2}


def table(points: list[dict[str, Any]]) -> str:
    lines = ["| width | seed | parameters | validation loss | mean R2 |", "|---|---|---|---|---|"]
    for one in points:
        cells = (
            one["hidden_size"],
            one["seed"],
            f"{one['parameters']:,}",
            f"{one['loss']:.5f}",
            f"{one['mean_r2']:.3f}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def draw(points: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    sizes = sorted({one["parameters"] for one in points})
    for axes, name, title in ((left, "loss", "validation Huber loss"), (right, "mean_r2", "mean R2 of nine probes")):
        means = [mean(one[name] for one in points if one["parameters"] == size) for size in sizes]
        axes.plot(sizes, means, color="0.7", lw=1, zorder=0)
        axes.scatter([one["parameters"] for one in points], [one[name] for one in points], s=18, color="C0")
        axes.set(xscale="log", xlabel="parameters", ylabel=title)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.suptitle("simulated galaxies with a fifth of the noise: one dot per run, line through the means", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
