"""Guards, FLOP formulas, save points, sampling and evaluation batches: the trainer's parts that need no ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from megatron.checkpoint import TrainState
from megatron.engine.optimizer import parameter_groups
from megatron.generation.text import choose
from megatron.trainer.batches import evaluation_micro_batches
from megatron.trainer.metrics import Progress
from megatron.trainer.nonfinite import SuspiciousLossError, check_finite, check_initial_loss
from megatron.trainer.saves import is_save_point
from tests.support.engine_runs import IGNORE, Samples, make_samples
from tests.support.models import Case

pytestmark = pytest.mark.unit


def test_a_continued_run_must_not_start_at_a_random_models_loss() -> None:
    args = Case(vocab=4096).neox(world_size=1, from_scratch=False, load="somewhere", finetune=True)
    check_initial_loss(math.log(4096) - 2.01, args)
    with pytest.raises(SuspiciousLossError, match=r"the first loss .* is 8\.30.*convert_hf verify"):
        check_initial_loss(8.30, args)
    check_initial_loss(8.30, args.replace(allow_high_initial_loss=True))
    check_initial_loss(8.30, Case(vocab=4096).neox(world_size=1))  # from scratch


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_not_a_number_stops(loss: float, norm: float) -> None:
    with pytest.raises(SuspiciousLossError, match="iteration 7"):
        check_finite(loss, norm, 7)
    check_finite(1.0, 1.0, 7)


def test_save_points(tmp_path: Path) -> None:
    args = Case().neox(world_size=1, save=str(tmp_path), checkpoint_factor=4, extra_save_iters=[1], train_iters=10)
    assert [n for n in range(11) if is_save_point(args, n)] == [1, 4, 8, 10]
    assert is_save_point(args.replace(extra_save_iters=[0]), 0)
    assert not is_save_point(Case().neox(world_size=1), 4)


def test_norms_do_not_decay() -> None:
    model = Case().hugging_face()
    decaying, plain = parameter_groups(model, 0.1)
    assert decaying["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    norms = {id(p) for name, p in model.named_parameters() if "norm" in name}
    assert {id(p) for p in plain["params"]} == norms
    assert len(decaying["params"]) + len(plain["params"]) == len(list(model.parameters()))


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


def test_sampling_keeps_to_its_limits() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, 1.0, -1.0])
    generator = torch.Generator().manual_seed(0)

    def drawn(**keys: object) -> set[int]:
        args = Case().neox(world_size=1, **keys)
        return {choose(logits, args, generator) for _ in range(300)}

    assert drawn(temperature=0.0) == {1}
    assert drawn(temperature=2.0, top_k=2) == {1, 2}
    probabilities = (logits / 2.0).softmax(-1)
    assert drawn(temperature=2.0, top_p=float(probabilities[1]) + 0.01) == {1, 2}
    assert drawn(temperature=2.0) == {0, 1, 2, 3, 4}


def test_progress_writes_jsonl_and_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = Case().neox(
        world_size=1, log_interval=2, log_dir=str(tmp_path / "log"), tensorboard_dir=str(tmp_path / "tb"), train_iters=3
    )
    progress = Progress(args, rank=0)
    for iteration in (1, 2, 3):
        state = TrainState(iteration, 8 * iteration)
        progress.step(state, loss=1.5, learning_rate=1e-3, grad_norm=0.5, learned_tokens=7, skipped_steps=0)
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[0].split()[1] for line in lines] == ["2/3", "3/3"]
    for part in ("loss 1.5000", "lr 1.000e-03", "grad norm 0.500", "tokens/s", "TFLOP/s per rank (Megatron formula)"):
        assert part in lines[0]
    records = [json.loads(line) for line in (tmp_path / "log/metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in records] == [1, 2, 3]
    assert "runtime/tokens_per_sec" in records[1]
    assert list((tmp_path / "tb").iterdir())
    silent = Progress(args, rank=1)
    silent.step(TrainState(1), 1.0, 1.0, 1.0, 1, 0)
    assert capsys.readouterr().out == ""
