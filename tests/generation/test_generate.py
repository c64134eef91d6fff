"""Continuations at any layout equal those of `transformers`, independent of batch, chunks and slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.common.errors import UserError
from megatron.generation.generate import Batching, Generator, generate
from megatron.generation.sampling import Sampling
from megatron.generation.sequences import Endings
from megatron.model.cache import CachedTokens, KeyValueCache, input_shape, run_cached
from tests.support.generation_runs import by_transformers, continued, layout, prompts, sequences
from tests.support.models import LLAMA3_ROPE, Case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

SIZES: dict[str, Any] = {"heads": 8, "kv_heads": 4, "head_dim": 8, "layers": 4, "intermediate": 96, "vocab": 96}
UNTIED = Case(**SIZES, seq=128, rope=LLAMA3_ROPE)
TIED = Case(**SIZES, seq=128, tied=True)
LENGTHS = [3, 11, 1, 24, 8, 17, 33, 2, 9]
NEW = 64

# --- greedy


def _greedy(rank: int, world_size: int, case: Case, split: dict[str, int], lengths: list[int], new: int) -> Any:
    from tests.support.engine_runs import inference

    args = case.neox(world_size=world_size, **split)
    engine = inference(args, dict(case.hugging_face().state_dict()))
    return continued(engine, args, sequences(prompts(case, lengths), new))


def _few(rank: int, world_size: int, case: Case, split: dict[str, int]) -> Any:
    """In the second run one replica has no prompt, in the third each group has one prompt for many slots."""
    from tests.support.engine_runs import inference

    args = case.neox(world_size=world_size, **split)
    engine = inference(args, dict(case.hugging_face().state_dict()))
    return [
        continued(engine, args, sequences(prompts(case, lengths), 8), batching=Batching(slots, 8))
        for lengths, slots in FEW
    ]


FEW = [(LENGTHS, 4), ([5], 4), ([7, 2, 3, 9], 16)]
FAST = [(1, 1, TIED), (2, 2, UNTIED), (1, 4, TIED)]
ALL = [(tp, pp, case) for tp in (1, 2, 4) for pp in (1, 2, 4) for case in (UNTIED, TIED) if tp * pp <= 8]


@pytest.mark.parametrize(
    ("tp", "pp", "case"),
    [
        pytest.param(
            *point,
            id=f"tp{point[0]}-pp{point[1]}-{'tied' if point[2].tied else 'rope'}",
            marks=[] if point in FAST else pytest.mark.slow,
        )
        for point in ALL
    ],
)
def test_greedy_tokens_equal_transformers(tp: int, pp: int, case: Case) -> None:
    """Nine ragged prompts in groups of four slots, read eight tokens at a time.

    With four stages, some boundaries fall between non-decoder layers.
    """
    expected = by_transformers(case, prompts(case, LENGTHS), NEW)
    method = {"pipe_partition_method": "uniform"} if pp == 4 else {}
    for found in run_ranks(_greedy, tp * pp, case, layout(tp, pp) | method, LENGTHS, NEW):
        assert found == expected


def test_replicas_share_the_prompts() -> None:
    """Two replicas of two stages, with many prompts and with few."""
    expected = [by_transformers(TIED, prompts(TIED, lengths), 8) for lengths, _ in FEW]
    assert run_ranks(_few, 4, TIED, layout(1, 2)) == [expected] * 4


# --- one process: independence of the batch, limits of the context, contents of the cache


def _alone(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    """All checks that need a single engine without a split."""
    from tests.support.engine_runs import inference

    args = case.neox(world_size=world_size)
    engine = inference(args, dict(case.hugging_face().state_dict()))
    given = prompts(case, LENGTHS)
    sampling = Sampling(temperature=1.5, top_p=0.95, repetition_penalty=1.2)
    results: dict[str, Any] = {
        f"{slots} slots, chunks of {chunk}": continued(
            engine, args, sequences(given, 20, seed=5), sampling, batching=Batching(slots, chunk)
        )
        for slots, chunk in ((4, 8), (1, 512), (9, 1), (3, 7))
    }
    ends = Endings(frozenset({by_transformers(case, given[:1], 6)[0][5]}))
    results["stopped"] = continued(engine, args, sequences(given[:1], 20), endings=ends)
    full, almost = prompts(case, [case.seq, case.seq - 3])
    results["full"] = continued(engine, args, sequences([full, almost], 20), batching=Batching(2, 50))
    for wrong in ([], [0] * (case.seq + 1)):
        try:
            continued(engine, args, sequences([[1], wrong], 2))
        except UserError as error:
            results[f"{len(wrong)} tokens"] = str(error)
    results["turns"] = _turns(engine, args, case)
    results["cuts"] = _cut_at_every_layer(engine, args, case)
    results["logits"] = _cached_and_recomputed(engine, args, case)
    with torch.no_grad():
        for _, layer in engine.numbered_layers():
            if hasattr(layer, "mlp"):
                layer.mlp.linear2.weight[0] = torch.nan
    try:
        continued(engine, args, sequences(given, 2))
    except UserError as error:
        results["NaN"] = str(error)
    return results


def _turns(engine: Any, args: Any, case: Case) -> list[tuple[list[int], list[int], int]]:
    """(prompt, new ids, number of tokens read) of three prompts one after the other on one generator.

    The second continues the first; the third diverges from the first within the first's new tokens.
    """
    generator, read = Generator(engine, args, Batching(slots=2, chunk=8)), 0
    forward = engine.forward_cached

    def counting(ids: torch.Tensor, tokens: CachedTokens) -> torch.Tensor:
        nonlocal read
        read += ids.numel()
        return forward(ids, tokens)

    engine.forward_cached = counting
    (first,), results = prompts(case, [20]), []
    prompt = first
    for turn in range(3):
        read = 0
        (found,) = generate(generator, sequences([prompt], 10), Sampling(), Endings(frozenset()))
        results.append((prompt, found.new, read))
        prompt = [*first, *results[0][1], 5, 6, 7] if turn == 0 else [*first, *results[0][1][:4], 3]
    del engine.forward_cached
    generator.close()
    return results


@torch.inference_mode()
def _cut_at_every_layer(engine: Any, args: Any, case: Case) -> list[str]:
    """Errors with a stage boundary before each layer, with and without outputs."""
    layers, wrong = engine.module.forward_funcs, []
    ids = torch.tensor(prompts(case, [7, 7, 7]))
    for outputs in ([(0, 6), (2, 3)], []):
        tokens = CachedTokens(KeyValueCache(3, case.seq), 0, [0] * 3, 7, outputs, torch.device("cpu"))
        whole = run_cached(layers, 0, args.num_layers, ids, tokens)
        for cut in range(1, len(layers)):
            hidden = run_cached(layers[:cut], 0, args.num_layers, ids, tokens)
            if hidden.shape != input_shape(cut, args.num_layers, args.hidden_size, tokens):
                wrong.append(f"layer {cut}: shape {tuple(hidden.shape)}")
            logits = run_cached(layers[cut:], cut, args.num_layers, hidden, tokens)
            if outputs and not torch.equal(logits, whole):
                wrong.append(f"layer {cut}: other logits")
    return wrong


def _cached_and_recomputed(engine: Any, args: Any, case: Case) -> dict[str, float]:
    """Largest difference between uncached and cached logits at all positions of three ragged rows.

    The cached rows are read in chunks of 16 tokens and then one by one at different positions. Wrong positions, or a
    neighbor's slot, must make a difference.
    """
    lengths = [40, 33, 37]
    rows = prompts(case, lengths, seed=9)
    ids = torch.zeros(4, case.seq, dtype=torch.int64)
    for row, prompt in enumerate(rows):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    whole = torch.cat([engine.logits(ids[:2]), engine.logits(ids[2:])])

    @torch.inference_mode()
    def difference(shift: int = 0, slot: int = 0) -> float:
        cache, worst = KeyValueCache(4, case.seq), 0.0

        def forward(first: int, starts: list[int], s: int) -> None:
            nonlocal worst
            block = torch.stack([ids[first + row, start : start + s] for row, start in enumerate(starts)])
            outputs = [(row, token) for row in range(len(starts)) for token in range(s)]
            tokens = CachedTokens(cache, first, starts, s, outputs, torch.device("cpu"))
            if s == 1:
                tokens.positions += shift
                tokens.first += slot
            logits = engine.forward_cached(block, tokens)[:, 0]
            for (row, token), found in zip(outputs, logits, strict=True):
                worst = max(worst, float((found - whole[first + row, starts[row] + token]).abs().max()))

        for start in (0, 16):
            forward(0, [start] * 3, 16)
        for position in range(32, 40):
            forward(0, [position], 1)
        forward(0, [39, 32, 32], 1)
        cache.move(0, 3)
        forward(0, [39, 32, 32], 1)
        return worst

    return {"right": difference(), "wrong position": difference(shift=1), "wrong slot": difference(slot=1)}


@pytest.mark.parametrize(
    "case", [pytest.param(UNTIED, id="rope"), pytest.param(TIED, id="tied", marks=pytest.mark.slow)]
)
def test_one_process(case: Case) -> None:
    (found,) = run_ranks(_alone, 1, case)
    batches = [texts for name, texts in found.items() if "slots" in name]
    assert len(batches) == 4
    assert all(texts == batches[0] for texts in batches), "slots and chunks change no token"
    assert len({token for text in batches[0] for token in text}) > 60, "it samples"
    (first,) = by_transformers(case, prompts(case, LENGTHS[:1]), 6)
    assert found["stopped"] == [first[: first.index(first[5])]]
    full, almost = prompts(case, [case.seq, case.seq - 3])
    assert found["full"] == [by_transformers(case, [full], 1)[0], by_transformers(case, [almost], 4)[0]]
    assert found["0 tokens"] == f"prompt 2: it has 0 tokens; expected 1 to {case.seq} (seq_length)"
    assert found[f"{case.seq + 1} tokens"].startswith(f"prompt 2: it has {case.seq + 1} tokens")
    assert "not finite" in found["NaN"]
    for prompt, text, _ in found["turns"]:
        assert [text] == by_transformers(case, [prompt], 10)
    # Prompt and all new tokens but the last; then only tokens that are not in the cache.
    assert [read for _, _, read in found["turns"]] == [29, 4 + 9, 1 + 9]
    assert found["cuts"] == []
    logits = found["logits"]
    assert logits["right"] < 1e-5
    assert min(logits["wrong position"], logits["wrong slot"]) > 1e-3, "the mutations show"


# --- sampling


def _sampled(rank: int, world_size: int, case: Case, split: dict[str, int], keys: dict[str, Any]) -> Any:
    from tests.support.engine_runs import inference

    args = case.neox(world_size=world_size, **split, **keys)
    engine = inference(args, dict(case.hugging_face().state_dict()))
    sampling = Sampling(temperature=1.0, top_k=50, top_p=0.95, min_p=0.001, repetition_penalty=1.1)
    given = sequences(prompts(case, [5, 9, 2, 30, 14, 1, 8, 21, 3, 12]), 100, seed=11)
    return continued(engine, args, given, sampling, batching=Batching(10, 16))


SAMPLED = Case(**SIZES, seq=160, rope=LLAMA3_ROPE)


def test_sampling_gives_the_same_ids_at_four_layouts() -> None:
    """1,000 tokens in fp32."""
    layouts = [(1, 1), (2, 1), (1, 2), (2, 2)]
    texts = [run_ranks(_sampled, tp * pp, SAMPLED, layout(tp, pp), {})[0] for tp, pp in layouts]
    assert sum(map(len, texts[0])) == 1000
    assert texts == [texts[0]] * 4
    assert len({tuple(text) for text in texts[0]}) == 10
