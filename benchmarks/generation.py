"""Generation speed: python benchmarks/generation.py [recomputing] [transformers] [pipeline] [layouts]

A small Llama with random weights on single-threaded CPU ranks, fp32, greedy. `recomputing` measures generation without
a cache: every token runs the whole sequence through the engine (256 new tokens). `transformers` runs its `generate` on
the same weights, with 8 ragged left-padded prompts, in the same process, in alternation. `pipeline` runs two stages and
reports the fraction of time in which both compute. `layouts` samples the same 1,000 tokens at four layouts in fp32 and
bf16, and reports how many agree. CPU-time ratios are given as well as wall-time ratios, which other load disturbs.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.ranks import run_ranks_forked  # noqa: E402
from benchmarks.small_llama import SmallLlama  # noqa: E402

PEERS = ("recomputing", "transformers", "pipeline", "layouts")
NEW, PROMPT, BATCH = 256, 64, 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"default: {' '.join(PEERS)}")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side")
    options = parser.parse_args()
    chosen = options.peers or list(PEERS)
    if unknown := set(chosen) - set(PEERS):
        parser.error(f"{', '.join(sorted(unknown))}: no such peer; choose from {', '.join(PEERS)}")
    import deepspeed  # noqa: F401  imported once, before the forks

    case = SmallLlama(options.hidden, options.layers, 8192, 512)
    print(f"hidden {case.hidden}, {case.layers} layers, vocabulary {case.vocab}, fp32, torch {torch.__version__}")
    if "recomputing" in chosen:
        print(run_ranks_forked(_against_recomputing, 1, case)[0])
    if "transformers" in chosen:
        print(run_ranks_forked(_against_transformers, 1, case, options.rounds)[0])
    if "pipeline" in chosen:
        _print_pipeline(case)
    if "layouts" in chosen:
        _print_layouts()
    return 0


class Sides:
    """Wall and CPU seconds of each measured implementation."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[tuple[float, float]]] = {}

    def measure(self, side: str, action: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = action()
        self.seconds.setdefault(side, []).append((time.perf_counter() - wall, time.process_time() - cpu))
        return result

    def medians(self, side: str) -> tuple[float, float]:
        wall, cpu = zip(*self.seconds[side], strict=True)
        return statistics.median(wall), statistics.median(cpu)

    def ratio(self, peer: str, own: str) -> str:
        (peer_wall, peer_cpu), (own_wall, own_cpu) = self.medians(peer), self.medians(own)
        single = [p[1] / o[1] for p, o in zip(self.seconds[peer], self.seconds[own], strict=True)]
        return (
            f"{peer} {peer_cpu:.2f} s CPU ({peer_wall:.2f} s wall), this project {own_cpu:.2f} s CPU ({own_wall:.2f} s "
            f"wall): {peer_cpu / own_cpu:.2f} times as fast in CPU time ({min(single):.2f} to {max(single):.2f} in "
            f"{len(single)} pairs), {peer_wall / own_wall:.2f} in wall time"
        )


def _prompts(case: SmallLlama, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [PROMPT - 5 * row for row in range(count)]
    return [torch.randint(case.vocab, (length,), generator=generator).tolist() for length in lengths]


def _generator(case: SmallLlama, around: Any = None, **keys: Any) -> tuple[Any, Any, Any]:
    """(engine, arguments, generator) on this rank with the weights of `case.transformers_model`, or random ones."""
    from benchmarks.small_llama import start_engine
    from megatron.engine.protocol import no_phases
    from megatron.generation.generate import Batching, Generator

    own = {"train_micro_batch_size_per_gpu": 1, "distributed_backend": "gloo", "precision": "fp32"}
    args = case.arguments(**own | keys)
    weights = dict(case.transformers_model().state_dict()) if args.global_num_gpus == 1 and not keys else None
    engine = start_engine(args, torch.device("cpu"), weights, training=False)
    generator = Generator(engine, args, Batching(slots=BATCH), around or no_phases)
    return engine, args, generator


def _continued(generator: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    from megatron.generation.generate import generate
    from megatron.generation.sampling import Sampling
    from megatron.generation.sequences import Continuation, Endings

    given = [Continuation(number, 0, prompt, new) for number, prompt in enumerate(prompts)]
    return [found.new for found in generate(generator, given, Sampling(), Endings(frozenset()))]


def _against_recomputing(rank: int, world_size: int, case: SmallLlama) -> str:
    engine, args, generator = _generator(case)
    sides = Sides()
    (prompt,) = _prompts(case, 1)
    own = sides.measure("cache", lambda: _continued(generator, [prompt], NEW))[0]
    theirs = sides.measure("recomputing", lambda: _recomputed(engine, args, prompt, NEW))
    if own != theirs:
        raise SystemExit("the two generators differ")
    return f"one prompt of {PROMPT} tokens, {NEW} new ones, seq_length {case.seq}: " + sides.ratio(
        "recomputing", "cache"
    )


def _recomputed(engine: Any, args: Any, prompt: list[int], new: int) -> list[int]:
    """Greedy generation without a cache: each token runs the whole sequence, padded to `seq_length`."""
    ids = list(prompt)
    for _ in range(new):
        tokens = torch.zeros(1, args.seq_length, dtype=torch.int64)
        tokens[0, : len(ids)] = torch.tensor(ids)
        ids.append(int(engine.logits(tokens)[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


def _against_transformers(rank: int, world_size: int, case: SmallLlama, rounds: int) -> str:
    _, _, generator = _generator(case)
    model = case.transformers_model().eval()
    prompts = _prompts(case, BATCH)
    ids, mask = _left_padded(prompts)
    sides = Sides()
    own: list[list[int]] = []
    theirs = ids
    for _ in range(rounds + 1):  # the first one is not counted
        own = sides.measure("this", lambda: _continued(generator, prompts, NEW))
        theirs = sides.measure(
            "transformers.generate",
            lambda: model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None),
        )
    for found in sides.seconds.values():
        del found[0]
    same = sum(a == b for a, b in zip(own, theirs[:, ids.shape[1] :].tolist(), strict=True))
    return (
        f"{BATCH} prompts of {len(prompts[-1])} to {PROMPT} tokens, {NEW} new ones each, {same} of {BATCH} texts "
        "equal: " + sides.ratio("transformers.generate", "this")
    )


def _left_padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def _print_pipeline(case: SmallLlama) -> None:
    for prompts in (2 * BATCH, 1):
        spans = run_ranks_forked(_stage, 2, case, prompts)
        start, end = max(span[0] for span in spans), min(span[1] for span in spans)
        both = sum(
            max(0.0, min(a_end, b_end, end) - max(a, b, start)) for a, a_end in spans[0][2] for b, b_end in spans[1][2]
        )
        shares = [sum(stop - begin for begin, stop in span[2]) / (span[1] - span[0]) for span in spans]
        print(
            f"two stages, {prompts} prompts, {NEW // 2} new tokens each: both compute in {both / (end - start):.0%} of "
            f"the time, the first in {shares[0]:.0%}, the second in {shares[1]:.0%}"
        )


def _stage(
    rank: int, world_size: int, case: SmallLlama, prompts: int
) -> tuple[float, float, list[tuple[float, float]]]:
    """(start, end, spans of computation) of a stage, in seconds of the machine's clock."""
    spans: list[tuple[float, float]] = []

    @contextlib.contextmanager
    def around(phase: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        if phase == "forward":
            spans.append((begin, time.monotonic()))

    engine, _, generator = _generator(case, around, world_size=2, pipe_parallel_size=2)
    engine.run_inside(around)
    generator_prompts = _prompts(case, BATCH) * (prompts // BATCH) if prompts > 1 else _prompts(case, 1)
    _continued(generator, generator_prompts, 4)  # connects
    spans.clear()
    start = time.monotonic()
    _continued(generator, generator_prompts, NEW // 2)
    return start, time.monotonic(), spans


def _print_layouts() -> None:
    """Compare the ids of the same ten samples of 100 tokens at each layout with those on one rank."""
    case = SmallLlama(512, 4, 1024, 256)
    for precision in ("fp32", "bfloat16"):
        single = run_ranks_forked(_samples, 1, case, precision, 1, 1)[0]
        for tp, pp in ((2, 1), (1, 2), (2, 2)):
            texts = run_ranks_forked(_samples, tp * pp, case, precision, tp, pp)[0]
            before = sum(_equal_until(a, b) for a, b in zip(single, texts, strict=True))
            print(f"{precision}, TP{tp} x PP{pp} against one rank: {before} of 1000 sampled tokens before texts part")


def _equal_until(a: list[int], b: list[int]) -> int:
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def _samples(rank: int, world_size: int, case: SmallLlama, precision: str, tp: int, pp: int) -> list[list[int]]:
    from megatron.generation.generate import generate
    from megatron.generation.sampling import RandomNumbers, Sampling
    from megatron.generation.sequences import Continuation, Endings

    split = {"world_size": world_size, "model_parallel_size": tp, "pipe_parallel_size": pp, "precision": precision}
    _, _, generator = _generator(case, **split)
    given = [
        Continuation(number, 0, prompt, 100, RandomNumbers(0, number, 0))
        for number, prompt in enumerate(_prompts(case, 10))
    ]
    sampling = Sampling(temperature=1.0, top_p=0.95)
    return [found.new for found in generate(generator, given, sampling, Endings(frozenset()))]


if __name__ == "__main__":
    sys.exit(main())
