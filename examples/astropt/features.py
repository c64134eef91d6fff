"""The vectors of embed.py, computed from an exported model by transformers alone: every layer's mean over patches.

    python examples/astropt/features.py EXPORTED PREFIX OUTPUT.npy [--pixels]

`--pixels` writes the pixels of the images instead, as a baseline.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.astropt.load_exported import load_exported  # noqa: E402
from megatron.data.images import image, open_images, read_image_header  # noqa: E402
from megatron.data.patch_form import cut_patches  # noqa: E402

AT_ONCE = 100  # images


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("prefix")
    parser.add_argument("output", type=Path)
    parser.add_argument("--pixels", action="store_true")
    options = parser.parse_args()
    import pyarrow.parquet

    file, info = open_images(options.prefix)
    properties = read_image_header(options.prefix).properties
    ids = pyarrow.parquet.read_table(Path(options.prefix).parent / str(properties), columns=["id"])["id"].to_pylist()
    images = np.stack([image(file, info, number) for number in range(len(file))])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    layers = [0]
    if options.pixels:
        vectors = images.reshape(len(images), -1).astype(np.float32)
    else:
        model = load_exported(options.model)
        size, order = model.settings["size"], model.settings["order"]
        parts = []
        for start in range(0, len(images), AT_ONCE):
            # The last patch is only a target in training, never an input.
            cut = np.stack([cut_patches(one, size, order)[:-1] for one in images[start : start + AT_ONCE]])
            states = model.hidden_states(torch.from_numpy(cut))
            parts.append(torch.stack([state.float().mean(1) for state in states], dim=1))
        vectors = torch.cat(parts).numpy()
        layers = list(range(vectors.shape[1]))
    np.save(options.output, vectors)
    options.output.with_suffix(".ids.jsonl").write_text("".join(json.dumps({"id": one}) + "\n" for one in ids))
    options.output.with_suffix(".report.json").write_text(json.dumps({"layers": layers}) + "\n")
    print(f"{vectors.shape} in {options.output}")


if __name__ == "__main__":
    main()
