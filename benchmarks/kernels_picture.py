"""Bar charts of benchmarks/kernels.py: bandwidth of each operation relative to a copy, ours next to the fastest peer.

    python benchmarks/kernels_picture.py RESULTS.json PICTURE.png

RESULTS.json is the output of `benchmarks/kernels.py --json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

OURS, PEER, TARGET = "#1f5fa8", "#c9c9c9", "#c0392b"
NAMES = {"rms_norm": "norm", "add_rms_norm": "add + norm", "cross_entropy": "cross-entropy"}


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw a panel per layout of the first model: bars for ours and for the fastest peer, labeled, and the target."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = [r for r in report["results"] if r["model"] == report["results"][0]["model"]]
    layouts = list(dict.fromkeys(r["layout"] for r in results))
    rows = list(dict.fromkeys((r["op"], r["direction"]) for r in results))
    figure, panels = pyplot.subplots(
        1, len(layouts), sharey=True, squeeze=False, figsize=(3.6 * len(layouts) + 2, 0.42 * len(rows) + 1.6)
    )
    for axes, layout in zip(panels[0], layouts, strict=True):
        for place, (op, direction) in enumerate(rows):
            here = [r for r in results if (r["layout"], r["op"], r["direction"]) == (layout, op, direction)]
            peers = [r for r in here if r["who"] != "ours"]
            for r in (r for r in here if r["who"] == "ours"):
                axes.barh(place - 0.2, r["of_copy"], 0.4, color=OURS, label="ours")
                if r.get("target"):
                    axes.plot([r["target"]] * 2, [place - 0.42, place + 0.02], color=TARGET, lw=2, label="target")
            if peers:
                best = max(peers, key=lambda r: r["of_copy"])
                axes.barh(place + 0.2, best["of_copy"], 0.4, color=PEER, label="fastest other")
                axes.text(best["of_copy"] + 0.01, place + 0.2, best["who"], va="center", fontsize=7)
        axes.axvline(1, color="black", lw=0.8)
        axes.set_title(layout, fontsize=10)
        axes.set_xlim(0, max(1.15, 1.1 * max(r["of_copy"] for r in results)))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_yticks(range(len(rows)), [f"{NAMES.get(op, op)}, {direction}" for op, direction in rows])
    panels[0][0].invert_yaxis()
    named = {label: handle for axes in panels[0] for handle, label in zip(*axes.get_legend_handles_labels())}  # noqa: B905
    place = {"loc": "upper left", "bbox_to_anchor": (0, 0.95), "ncols": len(named)}
    figure.legend(named.values(), named.keys(), fontsize=8, frameon=False, **place)
    figure.supxlabel("useful bytes per second, as a fraction of a copy", fontsize=9)
    model, tokens = results[0]["model"], results[0]["tokens"]
    figure.suptitle(f"Llama-3.1-{model}, {tokens:,} tokens, {report['device']}", x=0.01, ha="left", fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("give two files: the output of `benchmarks/kernels.py --json`, and the picture to write", file=sys.stderr)
        return 2
    source, picture = map(Path, arguments)
    try:
        report = json.loads(source.read_text())
        draw(report, picture)
    except (OSError, ValueError, KeyError, IndexError) as error:
        print(f"{source} is not what `benchmarks/kernels.py --json` writes: {error!r}", file=sys.stderr)
        return 2
    print(f"wrote {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
