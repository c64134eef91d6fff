"""AstroPT, scaled down: render galaxies, train a model on their patches, and measure what it has learned.

    python examples/astropt/run.py [--output astropt_out]

Every command is printed before it runs; README.md in this folder says what to look at.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.astropt.galaxies import NAMES  # noqa: E402
from examples.steps import REPLACES, Steps, replace_output  # noqa: E402

HERE = "examples/astropt"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("astropt_out"), help=REPLACES)
    parser.add_argument("--train", type=int, default=4400, help="galaxies to train on")
    parser.add_argument("--probe", type=int, default=1600, help="further galaxies, to fit and test probes")
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    replace_output(ROOT / options.output, parser)
    start = time.monotonic()
    run = Run(options.output, options)
    run.render()
    run.train()
    run.probe()
    run.complete()
    run.title("what was shown")
    print(run.report(), f"\nthe whole run took {time.monotonic() - start:.0f} s")
    return 0


class Run(Steps):
    def __init__(self, out: Path, options: argparse.Namespace) -> None:
        super().__init__()
        self.out, self.options = out, options
        self.run_keys = (
            *("--train_data_paths", f"[{out}/data/train]", "--valid_data_paths", f"[{out}/data/probe]"),
            *("--save", out / "checkpoints", "--log_dir", out / "logs", "--train_iters", options.steps),
        )

    def render(self) -> None:
        out, options = self.out, self.options
        self.title("render galaxies with known properties; cut out real ones from the Hubble Deep Field")
        for name, count, first in (("train", options.train, 0), ("probe", options.probe, options.train)):
            words = ("--count", count, "--first", first, "--output", out / f"raw/{name}.npz")
            self.python(f"{HERE}/galaxies.py", *words)
        self.python(f"{HERE}/hubble.py", "--output", out / "raw/hubble.npz")
        self.title("import them: .bin and .idx, a header, a row of properties for each")
        for name in ("train", "probe", "hubble"):
            words = ("--input", out / f"raw/{name}.npz", "--output-prefix", out / f"data/{name}")
            self.python("tools/datasets/preprocess_images.py", *words, "--bands", "z", "r", "g")
        self.python(
            *("tools/datasets/inspect_data.py", out / "data/train", "--samples", 12, "--patch-size", 8),
            *("--grid", out / "galaxies.png"),
        )

    def train(self) -> None:
        self.title("train the model to predict the next patch along the spiral")
        self.python("deepy.py", "train.py", f"{HERE}/train.yml", *self.run_keys)

    def probe(self) -> None:
        out = self.out
        self.title("vectors of every layer, of the trained model and of its initial weights")
        loaded = ("--load", out / "checkpoints", "--from_scratch", "false")
        for name, data, words in (
            ("untrained", "probe", ()),
            ("trained", "probe", loaded),
            ("hubble", "hubble", loaded),
        ):
            self.python(
                *("deepy.py", "embed.py", f"{HERE}/train.yml", *self.run_keys, *words, "--embed.layers", "all"),
                *("--embed.input", out / "data" / data, "--embed.output", out / f"vectors/{name}.npy"),
            )
        self.title("export the model; compute the same vectors by transformers and torch alone; write the pixels")
        exported = out / "hf/exported"
        self.python("tools/convert_hf", "to-hf", "--input", out / "checkpoints", "--output", exported, "--quiet")
        command = (f"{HERE}/features.py", exported, out / "data/probe")
        self.python(*command, out / "vectors/transformers.npy")
        self.python(*command, out / "vectors/pixels.npy", "--pixels")
        self.title("linear probes: trained vectors against untrained ones and the pixels' principal components")
        self.python(
            *("-m", "tools.probe", "properties", "--trained", out / "vectors/trained.npy"),
            *("--untrained", out / "vectors/untrained.npy", "--inputs", out / "vectors/pixels.npy"),
            *("--labels", out / "data/probe.parquet", "--targets", *NAMES, "--test-share", 0.5),
            *("--output", out / "probe.json", "--picture", out / "probe.png"),
        )
        self.title("apply the probes to real galaxies")
        self.python(f"{HERE}/predictions.py", out)

    def complete(self) -> None:
        out = self.out
        self.title("complete images from their first quarter: rendered galaxies, then real ones")
        for name, folder in (("probe", "completions"), ("hubble", "hubble")):
            self.python(
                *("deepy.py", "generate.py", f"{HERE}/train.yml", *self.run_keys, "--from_scratch", "false"),
                *("--load", out / "checkpoints", "--completion.path", out / f"data/{name}"),
                *("--completion.given_patches", 16, "--completion.output", out / folder),
            )

    def report(self) -> str:
        """The table of scores by property, with means; also written to report.md."""
        probe = json.loads((ROOT / self.out / "probe.json").read_text())
        means = probe["mean_r2"]
        lines = ["| property | trained | untrained | pixels, PCA |", "|---|---|---|---|"]
        for name, found in probe["properties"].items():
            scores = (found["sources"][source] for source in ("trained", "untrained", "inputs"))
            cells = (
                f"{one['test']:.3f} ({one['interval_95'][0]:.3f} to {one['interval_95'][1]:.3f})" for one in scores
            )
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append(f"| mean | {means['trained']:.3f} | {means['untrained']:.3f} | {means['inputs']:.3f} |")
        lines.append(
            f"\nR2 on galaxies that no probe has seen; the layer, or the number of components, is chosen by "
            f"cross-validation. Trained minus untrained: {means['trained'] - means['untrained']:.3f}; trained minus "
            f"pixels: {means['trained'] - means['inputs']:.3f}."
        )
        text = "\n".join(lines)
        (ROOT / self.out / "report.md").write_text(text + "\n")
        return text


if __name__ == "__main__":
    sys.exit(main())
