"""The report as a picture: the size of each model's delta, its cosine with the merged delta, and conflicting signs.

Needs matplotlib (`pip install .[picture]`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .report import WORKING_RANGE, MergeReport, cosine

# Okabe and Ito's palette, which is distinguishable with every kind of color vision.
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#999999")


def draw_report(report: MergeReport, path: Path) -> None:
    """Write the picture; equal reports give equal files."""
    import matplotlib
    from matplotlib.figure import Figure

    kinds = report.by_kind()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "merge", "font.size": 9}):
        figure = Figure(figsize=(11, 2.2 + 0.42 * len(kinds)), layout="constrained")
        sizes, angles, extents, conflicts = figure.subplots(1, 4, sharey=True, width_ratios=(3, 3, 3, 2))
        places = np.arange(len(kinds))
        height = 0.8 / max(1, len(report.labels))
        for i, label in enumerate(report.labels):
            sums = [(kind, kind.parents[i]) for kind in kinds.values()]
            at = places + (i - (len(report.labels) - 1) / 2) * height
            style = {"height": height, "color": _COLORS[i % len(_COLORS)], "label": label}
            sizes.barh(at, [(p.squares / k.elements) ** 0.5 for k, p in sums], **style)
            angles.barh(at, [cosine(p, k) for k, p in sums], **style)
            extents.barh(at, [p.extent for _, p in sums], **style)
        conflicts.barh(places, [100 * k.conflicts / k.elements for k in kinds.values()], color="#444444", height=0.5)
        sizes.set_yticks(places, list(kinds))
        sizes.invert_yaxis()
        sizes.set_xlabel("delta, root mean square")
        angles.set_xlabel("cosine with the merged delta")
        extents.set_xlabel("largest delta")
        extents.axvline(WORKING_RANGE, color="black", linewidth=1, linestyle="--")
        conflicts.set_xlabel("conflicting signs, %")
        for axes in (sizes, angles, extents, conflicts):
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        figure.legend(*sizes.get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else {})
