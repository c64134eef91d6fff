"""Evaluation batches: every sample once, for any split."""

from __future__ import annotations

import pytest

from megatron.evaluation.perplexity import evaluation_micro_batches
from tests.support.engine_runs import IGNORE, Samples, make_samples
from tests.support.models import Case

pytestmark = pytest.mark.unit


def test_evaluation_reads_every_sample_once_for_any_split() -> None:
    case = Case(seq=8)
    samples = Samples(make_samples(case, 11))
    for micro, dp in ((1, 1), (2, 1), (4, 2), (3, 2)):
        seen = []
        for rank in range(dp):
            for batch in evaluation_micro_batches(samples, 11, micro, rank, dp):
                assert batch["tokens"].shape == (micro, case.seq)
                real = batch["labels"].ne(IGNORE).any(1)
                seen += [tuple(row.tolist()) for row in batch["tokens"][real]]
        taught = [tuple(s["tokens"].tolist()) for s in samples if s["labels"].ne(IGNORE).any()]
        assert sorted(seen) == sorted(taught)
