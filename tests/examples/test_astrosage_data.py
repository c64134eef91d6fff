"""The data half of examples/astrosage, on fewer texts: the cleaning finds the damage, the conversations are masked."""

import json
from argparse import Namespace
from collections import Counter

import pytest
import zstandard

from examples.astrosage.report import cleaning, masks
from examples.astrosage.run import Run
from megatron.data.header import read_header
from megatron.data.indexed import IndexedFile

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("astrosage")
    run = Run(out, Namespace(share=0.2, conversations=150, cpt_epochs=2.5))
    run.clean()
    run.tokenize()
    run.converse()
    return run


def test_the_damage_is_found_and_the_rest_is_kept(run: Run) -> None:
    out = run.out
    stream = zstandard.ZstdDecompressor().stream_reader((out / "raw/astronomy.jsonl.zst").read_bytes())
    raw = [json.loads(line) for line in stream.read().splitlines()]
    dropped = [json.loads(line) for line in (out / "clean/astronomy_report/dropped.jsonl").read_text().splitlines()]
    rules = {entry["line"] - 1: entry["rule"] for entry in dropped}
    found: dict[str, Counter[str]] = {}
    for number, record in enumerate(raw):
        found.setdefault(record["damage"], Counter())[rules.get(number, "kept")] += 1
    kept_whole = found[""]["kept"] / found[""].total()
    assert kept_whole > 0.9
    assert "max_perplexity" not in found[""]
    assert set(found["noise"]) == {"max_perplexity"}
    assert found["header"]["kept"] == 0
    clean = [json.loads(line) for line in (out / "clean/astronomy.jsonl").read_text().splitlines()]
    assert [record["id"] for record in clean] == [record["id"] for n, record in enumerate(raw) if n not in rules]
    ids = {record["id"] for record in clean}
    twice = {kind: sum(f"{i} ({kind})" in ids and i in ids for i in ids) for kind in ("copy", "v2")}
    assert twice["copy"] == 0
    assert twice["v2"] <= 0.1 * found["version"].total()
    for record in clean:
        assert not set(record["text"]) & set("\ufb01\ufb02\ufb00\ufb03")
        assert "\u00e2\u20ac" not in record["text"]
    assert "| noise " in cleaning(out)


def test_the_data_is_ready_to_train_on(run: Run) -> None:
    out = run.out
    kept = json.loads((out / "clean/astronomy_report/summary.json").read_text())["kept"]
    header = read_header(out / "data/astronomy_text_document")
    assert header is not None
    assert header.documents == kept
    for name in ("reasoning", "astronomy", "general"):
        labels = IndexedFile(out / f"data/sft_{name}_label_document")
        assert all((document >= 0).any() and document[0] < 0 for document in labels)
    assert masks(out).count("|\n") == 4
    assert (out / "lengths.png").exists()
