"""benchmarks/kernels.py runs without a GPU, says so, and measures every operation forward and backward."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks import kernels_peers, kernels_picture

pytestmark = pytest.mark.kernels

ROOT = Path(__file__).resolve().parents[2]


def test_every_operation_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/kernels.py", "--device", "cpu", "--models", "8B", "--tokens", "8"]
    command += ["--runs", "2", "--no-compile", "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "this measures the PyTorch references" in done.stdout
    facts = json.loads((tmp_path / "r.json").read_text())
    assert facts["copy_gb_per_s"] > 0
    layouts = ["TP 1", "TP 8", "TP 8 with sequence parallelism"]
    ops = {"rms_norm": layouts, "add_rms_norm": layouts} | dict.fromkeys(
        ("rotary", "swiglu", "cross_entropy"), layouts[:2]
    )
    seen = {(r["op"], r["direction"], r["layout"], r["who"]) for r in facts["results"]}
    assert seen == {
        (op, direction, layout, who)
        for op, where in ops.items()
        for layout in where
        for direction in ("forward", "backward")
        for who in ("ours", "torch")
    }
    assert facts["adam_of_copy"]["torch"] > 0
    assert (tmp_path / "r.png").stat().st_size > 1000


def result(who: str, of_copy: float, **changes: object) -> dict[str, object]:
    same = {"op": "rms_norm", "direction": "forward", "model": "8B", "layout": "TP 1", "tokens": 8192, "target": None}
    return same | {"who": who, "of_copy": of_copy} | changes


def test_the_picture_shows_ours_the_target_and_the_fastest_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (figures.append(f), save(f, *a, **k)))
    rows = [
        result("ours", 0.9, target=0.95),
        result("torch", 0.6),
        result("quack", 0.8),
        result("ours", 0.5, model="70B"),
    ]
    rows += [result("ours", 0.4, layout="TP 8"), result("torch", 0.3, layout="TP 8")]
    source, picture = tmp_path / "recorded.json", tmp_path / "p.png"
    source.write_text(json.dumps({"device": "a GPU", "results": rows}))
    assert kernels_picture.main([str(source), str(picture)]) == 0
    assert picture.stat().st_size > 1000
    one, eight = figures[0].axes
    assert [bar.get_width() for bar in one.patches] == [0.9, 0.8]
    assert [t.get_text() for t in one.texts] == ["quack"]
    assert one.lines[0].get_xdata()[0] == 0.95
    assert [bar.get_width() for bar in eight.patches] == [0.4, 0.3]
    assert eight.get_title() == "TP 8"


def test_what_is_no_result_gives_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wrong.json").write_text("{}")
    assert kernels_picture.main([str(tmp_path / "wrong.json"), str(tmp_path / "p.png")]) == 2
    assert "is not what `benchmarks/kernels.py --json` writes" in capsys.readouterr().err
    assert kernels_picture.main([]) == 2


def test_peers_count_only_where_their_functions_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's apex is not NVIDIA's: a package of that name without `apex.optimizers` is no peer."""

    def norm(x: Tensor, *_: object, **__: object) -> Tensor:
        return x

    modules = {
        "apex": {},
        "apex.normalization.fused_layer_norm": {"fused_rms_norm_affine": norm},
        "quack": {"rmsnorm": norm},
    }

    def imported(name: str) -> SimpleNamespace:
        if name not in modules:
            raise ImportError(name)
        return SimpleNamespace(**modules[name])

    monkeypatch.setattr(kernels_peers.importlib, "import_module", imported)
    weight = torch.ones(8)
    assert set(kernels_peers.norms(8, weight)) == {"quack"}
    assert kernels_peers.cross_entropy() == {}, "this quack has no cross_entropy"
    assert kernels_peers.adam() == {}
    modules["apex.optimizers"] = {"FusedAdam": torch.optim.AdamW}
    assert set(kernels_peers.norms(8, weight)) == {"quack", "apex"}
    assert set(kernels_peers.adam()) == {"apex"}
