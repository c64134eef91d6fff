"""Sequence parallelism trains the same model as one process, and silent deviations are detected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.verify import verify_checkpoint
from megatron.neox_arguments import NeoXArgs
from tests.support.engine_runs import Samples, inference, load, make_samples, rank_parameters, step, whole_logits
from tests.support.models import Case
from tests.support.ranks import run_ranks
from tests.support.runs import metrics, run_case, weights
from tests.support.token_files import random_documents
from tests.support.variant_runs import (
    GLOBAL_BATCH,
    TIED,
    Split,
    Variant,
    differences,
    train_variant,
    trained,
)

pytestmark = pytest.mark.distributed

PLAIN = Variant()
EVERYTHING = Variant(TIED, documents=True, recompute=True)
VARIANTS = (PLAIN, EVERYTHING)
SLOW_VARIANTS = (
    Variant(documents=True),
    Variant(TIED),
    Variant(recompute=True),
    Variant(documents=True, recompute=True),
)
SMALL = Case(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=48, vocab=96, seq=16)
LAYOUTS: list[Split] = [(2, 1, 1), (2, 1, 2), (2, 2, 1), (2, 2, 2), (4, 1, 1), (4, 1, 2), (4, 2, 1)]
FAST = [(2, 1, 2), (2, 2, 2), (4, 1, 1)]
ONE: Split = (1, 1, 1)


def name(split: Split) -> str:
    return "tp{}pp{}dp{}".format(*split)


def assert_equals_one_process(variants: tuple[Variant, ...], split: Split) -> None:
    for variant, found, expected in zip(variants, trained(variants, split, True), trained(variants, ONE), strict=True):
        loss, norm, parameters = differences(found, expected)
        print(f"{variant}, {name(split)}: loss {loss:.1e}, norm {norm:.1e}, parameters {parameters:.1e}")
        assert loss <= 1e-6, variant
        assert norm <= 1e-6, variant
        assert parameters <= 1e-5, variant
        tp = split[0]
        assert f"each of {tp} tensor-parallel ranks holds {24 // tp} of 24 tokens" in found.description[-1]


@pytest.mark.parametrize(
    "split", [split if split in FAST else pytest.param(split, marks=pytest.mark.slow) for split in LAYOUTS], ids=name
)
def test_every_layout_trains_the_same_model(split: Split) -> None:
    assert_equals_one_process(VARIANTS, split)


@pytest.mark.slow
@pytest.mark.parametrize("split", LAYOUTS, ids=name)
def test_every_layout_trains_the_same_model_in_every_variant(split: Split) -> None:
    assert_equals_one_process(SLOW_VARIANTS, split)


@pytest.mark.parametrize("split", [(2, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)], ids=name)
def test_bf16_is_as_near_to_one_process_as_without(split: Split) -> None:
    """bf16 sums in another order differ by rounding. The reference is the same layout's difference from one process
    without sequence parallelism; the bounds are those for every layout (`test_layout_parity`)."""
    variants = (Variant(SMALL, precision="bfloat16"),)
    (one,), (plain,), (sliced,) = trained(variants, ONE), trained(variants, split), trained(variants, split, True)
    reference, found = differences(plain, one), differences(sliced, one)
    print("without:", reference, "with:", found)
    for theirs, ours, bound in zip(reference, found, (2.5e-4, 1.1e-2, 2.7e-2), strict=True):
        assert theirs < bound
        assert ours < bound
        assert ours < 3 * theirs


def _run(rank: int, world_size: int, keys: dict[str, Any]) -> None:
    run_case(SMALL, world_size, keys)


def test_a_whole_run_reports_what_it_does_without(tmp_path: Path) -> None:
    """Training, validation and saves through the trainer; replicas are compared in every step."""
    data = random_documents(tmp_path / "train", SMALL.vocab)
    for name in ("plain", "sliced"):
        keys = {
            "train_data_paths": [data],
            "valid_data_paths": [data],
            "model_parallel_size": 2,
            "pipe_parallel_size": 2,
            "sequence_parallel": name == "sliced",
            "train_iters": 4,
            "eval_interval": 2,
            "eval_iters": 1,
            "replica_check_interval": 1,
            "isolate_documents": True,
            "log_interval": 1,
            "log_dir": str(tmp_path / name / "log"),
            "save": str(tmp_path / name / "checkpoints"),
            "checkpoint_factor": 4,
        }
        run_ranks(_run, 4, keys)
    for key in ("train/lm_loss", "train/grad_norm", f"validation/{Path(data).name}/lm_loss"):
        found, expected = (metrics(tmp_path / name, key) for name in ("sliced", "plain"))
        assert len(found) > 2
        assert found == pytest.approx(expected, rel=1e-6), key
    assert verify_checkpoint(tmp_path / "sliced/checkpoints/global_step4") == []
    theirs = weights(tmp_path / "plain", 4)
    for name, tensor in weights(tmp_path / "sliced", 4).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-6)


# --- the comparisons fail without a safeguard


def _disturbed(rank: int, world_size: int, split: Split, trap: str) -> Any:
    """A training run with one of the three safeguards removed: history, and this rank's parameters."""
    from megatron.engine import deepspeed

    if trap in ("messages divided", "check taken away"):
        from megatron.neox_arguments import arguments
        from megatron.neox_arguments.deepspeed_config import deepspeed_dictionary

        arguments.deepspeed_dictionary = lambda args: {
            key: value for key, value in deepspeed_dictionary(args).items() if key != "pipeline"
        }
    if trap == "check taken away":
        deepspeed.DeepSpeedEngine.check_messages = lambda engine: None  # type: ignore[method-assign]
    if trap == "norms not summed":
        deepspeed.sum_over_slices = lambda gradients, group: None
    try:
        engine, history = train_variant(PLAIN, split, True)
    except deepspeed.EngineMismatchError as error:
        return str(error)
    return history, rank_parameters(engine)


def test_messages_that_deepspeed_divides_again_are_refused() -> None:
    for text in run_ranks(_disturbed, 4, (2, 2, 1), "messages divided"):
        assert "pipe_partitioned True, grad_partitioned True" in text
        assert "both must be false" in text


def test_divided_messages_would_train_something_else() -> None:
    history, _ = run_ranks(_disturbed, 4, (2, 2, 1), "check taken away")[0]
    expected = trained(VARIANTS, ONE)[0].history
    assert abs(history[0][1] / expected[0][1] - 1) > 0.01, "the gradient norm of the first step"


def test_norm_gradients_that_are_not_summed_are_seen() -> None:
    results = run_ranks(_disturbed, 2, (2, 1, 1), "norms not summed")
    expected = trained(VARIANTS, ONE)[0].history
    # Norms contribute little to the gradient; parity holds to 1e-6.
    assert abs(results[0][0][0][1] / expected[0][1] - 1) > 1e-5, "the gradient norm of the first step"
    first, second = (parameters.tensors for _, parameters in results)
    assert not torch.equal(first[2, "input_layernorm.scale"], second[2, "input_layernorm.scale"])


def _poisoned(rank: int, world_size: int) -> Any:
    """A step in which one rank's slice gives a norm a non-finite gradient: the result, and the changes."""
    from tests.support.engine_runs import batch_of, build

    args = PLAIN.arguments((2, 1, 1), True)
    engine = build(args, PLAIN.case)
    before = rank_parameters(engine).tensors
    if rank == 1:
        layer = dict(engine.numbered_layers())[3]
        layer.input_layernorm.scale.register_hook(lambda gradient: gradient * torch.nan)
    result = engine.train_step(batch_of(engine, args, PLAIN.samples()[:GLOBAL_BATCH]))
    after = rank_parameters(engine).tensors
    return result.applied, [key for key, tensor in before.items() if not torch.equal(tensor, after[key])]


def test_a_norm_gradient_that_is_not_finite_on_one_rank_is_applied_on_none() -> None:
    assert run_ranks(_poisoned, 2) == [(False, []), (False, [])]


# --- evaluation pads sequences

ODD = Case(heads=8, kv_heads=4, head_dim=8, layers=2, intermediate=88, vocab=160, seq=23)


def _evaluated(rank: int, world_size: int, sequence_parallel: bool, split: Split) -> Any:
    """Loss and learned tokens of odd sequences, and logits."""
    from megatron.evaluation.perplexity import evaluate

    tp, pp, _ = split
    keys = ODD.neox(isolate_documents=True, model_parallel_size=tp, pipe_parallel_size=pp).merged
    keys |= {"sequence_parallel": sequence_parallel, "from_scratch": None, "load": "unused"}
    args = NeoXArgs.from_dict(keys, world_size=world_size, task="eval")
    engine = inference(args, dict(ODD.hugging_face().state_dict()))
    samples = make_samples(ODD, 5)
    for sample in samples:
        sample["positions"] = torch.arange(ODD.seq)
        sample["positions"][9:] = torch.arange(ODD.seq - 9)
    result = evaluate(engine, args, Samples(samples))
    ids = torch.stack([samples[0]["tokens"], samples[1]["tokens"]])
    logits = whole_logits(engine, args, ids, torch.arange(ODD.seq).expand(2, -1).contiguous())
    return result.loss, result.learned_tokens, None if logits is None else logits[0]


def test_odd_sequences_are_evaluated_as_without() -> None:
    split = (2, 2, 1)
    plain, sliced = (run_ranks(_evaluated, 4, sliced, split) for sliced in (False, True))
    (loss, tokens, _), (expected_loss, expected_tokens, _) = sliced[0], plain[0]
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert tokens == expected_tokens
    for found, expected in zip(sliced, plain, strict=True):
        if expected[2] is not None:
            assert found[2].shape == (ODD.seq, ODD.vocab)
            assert (found[2] - expected[2]).abs().max() < 1e-5


# --- checkpoints


def _saved_and_resumed(rank: int, world_size: int, folder: str) -> Any:
    """For a run that begins with sequence parallelism, and one without: the losses and norms of the steps after a save,
    in the same engine and resumed with the opposite setting; and the shapes of the checkpoint's tensors."""
    from megatron.core import parallel_state
    from safetensors.torch import load_file

    from megatron.checkpoint.save import save_checkpoint
    from megatron.checkpoint.state import TrainState
    from megatron.checkpoint.torch_files import read_file
    from megatron.engine.deepspeed_files import OPTIMIZER_CLASSES
    from tests.support.engine_runs import build

    samples = PLAIN.samples()
    batches = [samples[start : start + GLOBAL_BATCH] for start in range(0, len(samples), GLOBAL_BATCH)]

    def make(sequence_parallel: bool, **keys: Any) -> Any:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        args = PLAIN.arguments((2, 2, 1), sequence_parallel, **keys)
        return args, build(args, PLAIN.case, seed=len(keys))

    found = []
    for first in (True, False):
        save = f"{folder}/{first}"
        args, engine = make(first, save=save, checkpoint_factor=1)
        step(engine, args, batches[0], 0)
        state = TrainState(iteration=1, consumed_samples=GLOBAL_BATCH)
        saved = save_checkpoint(engine, args, state, data_fingerprints={})
        onwards = [step(engine, args, batch, 1 + number) for number, batch in enumerate(batches[1:])]
        args, engine = make(not first, load=save, from_scratch=False)
        assert load(engine, args).iteration == 1
        resumed = [step(engine, args, batch, 1 + number) for number, batch in enumerate(batches[1:])]
        shapes: dict[str, Any] = {}
        for path in sorted(saved.glob("*.pt")) if rank == 0 else []:
            _shapes(read_file(path, classes=OPTIMIZER_CLASSES), path.name, shapes)
        for path in sorted(saved.glob("*optim_states.safetensors")) if rank == 0 else []:
            ranges = {name: tensor for name, tensor in load_file(path).items() if name != "random_state"}
            _shapes(ranges, path.name, shapes)
        found.append((onwards, resumed, shapes))
    return found


def _shapes(content: Any, where: str, found: dict[str, Any]) -> None:
    """Collect shape and dtype of every tensor in nested dicts and lists, by its path."""
    if isinstance(content, torch.Tensor):
        found[where] = (tuple(content.shape), content.dtype)
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list | tuple)
        else ()
    )
    for key, value in items:
        _shapes(value, f"{where}/{key}", found)


def test_checkpoints_with_and_without_are_interchangeable(tmp_path: Path) -> None:
    results = run_ranks(_saved_and_resumed, 4, str(tmp_path))
    (onwards, resumed, shapes), (plain_onwards, plain_resumed, plain_shapes) = results[0]
    for history, other in ((onwards, resumed), (plain_onwards, plain_resumed)):
        for (loss, norm), (loss_resumed, norm_resumed) in zip(history, other, strict=True):
            assert loss_resumed == pytest.approx(loss, rel=1e-6)
            assert norm_resumed == pytest.approx(norm, rel=1e-6)
    assert any("optim_states" in place for place in shapes)
    assert any("layer_" in place for place in shapes)
    assert shapes == plain_shapes
