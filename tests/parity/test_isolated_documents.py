"""With `isolate_documents`, each document of a packed sample is processed as if it were alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron.common.labels import IGNORE_INDEX
from megatron.data.indexed import IndexedWriter
from megatron.data.sample import SampleForm
from megatron.data.sources import RunningPack
from tests.support.engine_runs import inference, whole_logits
from tests.support.models import LLAMA3_ROPE, Case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

CASE = Case(heads=4, kv_heads=2, head_dim=16, rope=LLAMA3_ROPE, theta=500000.0, seq=96)
TOLERANCE = 1e-5


def _logits(rank: int, world_size: int, tokens: Tensor, positions: Tensor | None) -> Tensor:
    args = CASE.neox(model_parallel_size=world_size, world_size=world_size, isolate_documents=positions is not None)
    logits = whole_logits(inference(args, dict(CASE.hugging_face().state_dict())), args, tokens, positions)
    assert logits is not None
    return logits


def ours(tokens: Tensor, positions: Tensor | None, tp: int = 1) -> Tensor:
    return run_ranks(_logits, tp, tokens, positions)[0]


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, Tensor, Tensor]:
    """Two packed samples of short documents: tokens, positions, labels."""
    random = np.random.RandomState(1)
    prefix = tmp_path_factory.mktemp("data") / "d"
    writer = IndexedWriter(prefix, np.dtype(np.uint16))
    for length in random.randint(1, 45, 40):
        writer.add(random.randint(0, CASE.vocab, length))
    writer.finish()
    source = RunningPack(str(prefix), SampleForm(CASE.seq, isolate_documents=True), seed=1, samples=2)
    return tuple(torch.stack([source[i][key] for i in range(2)]) for key in ("tokens", "positions", "labels"))  # type: ignore[return-value]


@pytest.mark.parametrize("tp", [1, 2])
def test_packed_equals_separate_documents(batch: tuple[Tensor, Tensor, Tensor], tp: int) -> None:
    tokens, positions, labels = batch
    packed = ours(tokens, positions, tp)
    reference = CASE.hugging_face()
    documents = 0
    for row in range(2):
        edges = [*positions[row].eq(0).nonzero().flatten().tolist(), CASE.seq]
        for first, behind in itertools.pairwise(edges):
            with torch.no_grad():
                alone = reference(tokens[row : row + 1, first:behind]).logits[0]
            assert (packed[row, first:behind] - alone).abs().max() < TOLERANCE
            if behind < CASE.seq:
                assert labels[row, behind - 1] == IGNORE_INDEX
            documents += 1
    assert documents > 6


def test_another_document_changes_nothing_and_would_without_isolation(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens, positions, _ = batch
    second = int(positions[0, 1:].eq(0).nonzero()[0]) + 1
    changed = tokens.clone()
    changed[0, :second] = (changed[0, :second] + 1) % CASE.vocab
    assert torch.equal(ours(tokens, positions)[0, second:], ours(changed, positions)[0, second:])
    assert (ours(tokens, None)[0, second:] - ours(changed, None)[0, second:]).abs().max() > 100 * TOLERANCE
