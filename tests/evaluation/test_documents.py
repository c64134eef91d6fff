"""Document losses equal those of `transformers` for any layout and file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.data.indexed import IndexedWriter
from tests.support.evaluation_models import CASE, LAYOUTS, SKY, driven, weights
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

# One text is longer than the context; one has letters of several bytes.
TEXTS = ["M☉ and Messier 31.", " ".join(" ".join(row) for row in SKY) * 2, "x"]


def _documents(rank: int, world_size: int, export: Path, split: dict[str, int], keys: dict[str, Any]) -> Any:
    from megatron.evaluation.checkpoint import evaluate_texts

    return driven(world_size, export, evaluate_texts, split, **keys)


def reference(ids: list[int], bos: int) -> float:
    """Summed loss of a document in pieces of `seq`: the first after BOS, the others after as much context as fits."""
    model = CASE.hugging_face()
    model.load_state_dict(weights())
    total = 0.0
    for start in range(0, len(ids), CASE.seq):
        piece = ids[start : start + CASE.seq]
        before = [bos] if start == 0 else ids[start - (CASE.seq + 1 - len(piece)) : start]
        with torch.no_grad():
            table = model(torch.tensor([before + piece[:-1]])).logits[0].log_softmax(-1)
        total -= float(table[len(before) - 1 :].gather(1, torch.tensor(piece)[:, None]).sum())
    return total


@pytest.mark.parametrize("layout", ["tp2pp2", pytest.param("dp2", marks=pytest.mark.slow)])
def test_losses_equal_transformers(layout: str, export: Path, tmp_path: Path, hf_tokenizer: Any) -> None:
    bos, eod = hf_tokenizer.bos, hf_tokenizer.eod
    encoded = [hf_tokenizer.encode(text) for text in TEXTS]
    assert len(encoded[1]) > 2 * CASE.seq
    rows = [{"text": text, "source": "short" if len(text) < 30 else "long"} for text in TEXTS]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    writer = IndexedWriter(tmp_path / "indexed", np.dtype(np.uint16))
    for ids in encoded:
        writer.add(np.array([bos, *ids, eod], np.uint16))
    writer.finish()
    documents = [str(tmp_path / "t.jsonl"), str(tmp_path / "indexed")]
    ranks, split = LAYOUTS[layout]
    keys = {"eval_documents": documents, "eval_results_prefix": f"{tmp_path}/out/"}
    report = run_ranks(_documents, ranks, export, split, keys)[0]["documents"]
    losses = [reference(ids, bos) for ids in encoded]
    found = [json.loads(line) for line in (tmp_path / "out" / "documents.jsonl").read_text().splitlines()]
    assert [d["tokens"] for d in found] == [len(ids) for ids in encoded] * 2
    assert [d["bytes"] for d in found] == [len(text.encode()) for text in TEXTS] * 2
    for document, loss in zip(found, losses * 2, strict=True):
        assert document["loss"] * document["tokens"] == pytest.approx(loss, abs=1e-4 * document["tokens"])
        assert document["bits_per_byte"] == pytest.approx(loss / math.log(2) / document["bytes"], rel=1e-4)
    assert report["long"]["loss"] == pytest.approx(losses[1] / len(encoded[1]), rel=1e-5)
    whole = sum(losses) / sum(map(len, encoded))
    assert report["indexed"]["loss"] == pytest.approx(whole, rel=1e-5)
    assert report["indexed"]["perplexity"] == pytest.approx(math.exp(whole), rel=1e-4)
    assert report["short"]["documents"] == 2


def _refused(rank: int, world_size: int, export: Path, keys: dict[str, Any]) -> str:
    from megatron.common.errors import UserError

    with pytest.raises(UserError) as caught:
        _documents(rank, world_size, export, {}, keys)
    return str(caught.value)


def test_lines_without_a_document_are_reported(export: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n{"txt": "b"}\n')
    keys = {"eval_documents": [str(path)], "eval_results_prefix": f"{tmp_path}/out/"}
    assert f"{path}, line 2: expected a JSON object with a text" in run_ranks(_refused, 1, export, keys)[0]
