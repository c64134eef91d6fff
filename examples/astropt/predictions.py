"""The probes applied to real galaxies: stamps of the Hubble Deep Field sorted by each predicted property.

    python examples/astropt/predictions.py OUT

Reads what run.py wrote to OUT; writes `hubble/predictions.png` and `predictions.json`. The true properties are unknown,
but some can be measured on the stamp: the rank correlation of prediction and measurement is printed. The probes are
fitted to simulated galaxies seen by another telescope, so the predicted values mean nothing here, but their order may.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron.data.image_pictures import picture_grid, save_picture  # noqa: E402
from megatron.data.images import image, open_images  # noqa: E402
from tools.probe.features import read_features  # noqa: E402
from tools.probe.labels import read_properties  # noqa: E402
from tools.probe.linear import predict  # noqa: E402

NAMES = ("mag_r", "g_r", "log_re", "axis_ratio")
SHOWN = 12  # stamps of each property, from the lowest prediction to the highest
EDGE = 4  # pixels whose median is the sky


def measured(stamp: NDArray[np.uint8]) -> tuple[float, float, float, float]:
    """Brightness, color, size and axis ratio [magnitudes, magnitudes, log10 pixels, 1] of [side, side, 3] in z, r, g.

    They are measured on stretched values, so only their order across stamps is meaningful.
    """
    values = stamp.astype(np.float64)
    border = np.ones(values.shape[:2], bool)
    border[EDGE:-EDGE, EDGE:-EDGE] = False
    light = np.clip(values - np.median(values[border], axis=0), 0, None)
    _, red, green = light.sum((0, 1)) + 1
    y, x = np.indices(border.shape) - (len(border) - 1) / 2
    weights = light.sum(-1) * (x**2 + y**2 < (len(border) / 4) ** 2)  # excludes neighbors
    weights = weights / max(weights.sum(), 1e-9)
    distance = np.hypot(x, y).reshape(-1)
    order = np.argsort(distance)
    half = distance[order][np.searchsorted(np.cumsum(weights.reshape(-1)[order]), 0.5)]
    xy, xx, yy = ((weights * one).sum() for one in (x * y, x**2, y**2))
    small, large = np.linalg.eigvalsh(np.array([[xx, xy], [xy, yy]]))
    magnitude = -2.5 * np.log10(red)
    return (
        magnitude,
        -2.5 * np.log10(green) - magnitude,
        float(np.log10(half)),
        float(np.sqrt(small / max(large, 1e-9))),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    from scipy.stats import spearmanr

    known, real = (read_features(out / f"vectors/{name}.npy") for name in ("trained", "hubble"))
    report = json.loads((out / "probe.json").read_text())["properties"]
    file, info = open_images(str(out / "data/hubble"))
    stamps = [image(file, info, number) for number in range(len(file))]
    seen = np.array([measured(stamp) for stamp in stamps])
    correlations, rows = {}, []
    for column, one in enumerate(read_properties(out / "data/probe.parquet", NAMES, ())):
        layer = report[one.name]["sources"]["trained"]["choice"]
        ids, values = one.of(known.ids)
        predicted = predict("ridge", known.layer(layer, known.rows_of(ids)), values, real.layer(layer))
        correlations[one.name] = float(spearmanr(predicted, seen[:, column]).statistic)
        places = np.linspace(0, len(stamps) - 1, SHOWN).astype(int)
        rows.append([stamps[number] for number in np.argsort(predicted, kind="stable")[places]])
        print(
            f"{one.name}: predicted and measured on {len(stamps)} stamps, rank correlation {correlations[one.name]:.2f}"
        )
    (out / "hubble").mkdir(exist_ok=True)
    (out / "hubble/predictions.json").write_text(json.dumps(correlations, indent=1) + "\n")
    save_picture(out / "hubble/predictions.png", picture_grid(rows))
    print(f"each row from the lowest to the highest {', '.join(correlations)}: {out / 'hubble/predictions.png'}")


if __name__ == "__main__":
    main()
