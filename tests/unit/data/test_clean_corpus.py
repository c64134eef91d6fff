"""clean_corpus.py: what is repaired, cut and dropped, by which rule; and that workers do not matter."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.conftest import real_texts
from tests.unit.data.test_preprocess import outputs, write_jsonl
from tools.datasets.clean_corpus import main

pytestmark = pytest.mark.unit


def clean(out: Path, *inputs: Path | str, workers: int = 1, **flags: Any) -> int:
    arguments = ["--input", *map(str, inputs), "--output", str(out), "--workers", str(workers)]
    for name, value in flags.items():
        arguments.append("--" + name.replace("_", "-"))
        if value is not True:
            arguments.append(str(value))
    return main(arguments)


def test_any_number_of_workers_writes_the_same(tmp_path: Path) -> None:
    texts = [*real_texts(), *real_texts()[:10], "short", "la " * 500, *(t.upper() for t in real_texts()[10:20])]
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    results = []
    for workers in (1, 3):
        out = tmp_path / f"w{workers}"
        assert clean(out / "c.jsonl.zst", source, workers=workers) == 0
        summary = json.loads((out / "c_report/summary.json").read_text())
        summary.pop("output")
        results.append((outputs(out / "c_report")["dropped.jsonl"], (out / "c.jsonl.zst").read_bytes(), summary))
    assert results[0] == results[1]
    assert results[0][2]["dropped"]["exact_duplicate"] >= 10
