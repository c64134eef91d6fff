"""What `eval.py` and `generate.py` do on every rank: load weights, run the pipeline forward, report."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine

from megatron.checkpoint.load import load_weights
from megatron.common.errors import UserError
from megatron.data.build import build_datasets
from megatron.engine.deepspeed import build_inference_engine, build_model
from megatron.engine.deepspeed_hooks import run_inside
from megatron.evaluation.perplexity import evaluate_all
from megatron.generation.text import continue_text
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.process_groups import Place, initialize
from megatron.supervision.status_store import Whereabouts
from megatron.supervision.step_timers import Phases
from megatron.supervision.watchdog import Watchdog
from megatron.tokenizer import build_tokenizer


def evaluate_checkpoint(args: NeoXArgs) -> None:
    """Validation loss and perplexity of every source, over the whole set, printed and written as JSON."""
    place = initialize(args)
    with Watchdog(args, place) as watchdog:
        datasets = build_datasets(args)
        engine, folder = _loaded_engine(args, place, watchdog.whereabouts)
        results = evaluate_all(engine, args, datasets.valid)
    if place.rank != 0:
        return
    for name, result in results.items():
        print(
            f"{name} | loss {result.loss:.6f} | perplexity {result.perplexity:.3f} | "
            f"{result.learned_tokens} tokens in {result.samples} samples"
        )
    report = {
        "checkpoint": str(folder),
        "precision": args.precision,
        "results": {name: {**asdict(r), "perplexity": r.perplexity} for name, r in results.items()},
    }
    path = Path(f"{args.eval_results_prefix}eval_results.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")


def generate_text(args: NeoXArgs) -> None:
    """Continue every prompt (or start from the beginning-of-text token); JSON lines with GPT-NeoX's fields."""
    place = initialize(args)
    with Watchdog(args, place) as watchdog:
        records = _continuations(args, place, watchdog.whereabouts)
    if place.rank == 0:
        _write_samples(Path(args.sample_output_file), records)


def _continuations(args: NeoXArgs, place: Place, whereabouts: Whereabouts) -> list[dict[str, Any]]:
    assert args.vocab_file is not None  # checked with the configuration
    tokenizer = build_tokenizer(args.tokenizer_type, args.vocab_file)
    prompts = _prompts(args)
    engine, _ = _loaded_engine(args, place, whereabouts)
    generator = torch.Generator().manual_seed(args.seed)
    records = []
    for prompt in prompts:
        start = time.perf_counter()
        beginning = [] if tokenizer.bos is None else [tokenizer.bos]
        new, finished = continue_text(engine, args, beginning + tokenizer.encode(prompt), tokenizer.eod, generator)
        records.append(
            {
                "context": prompt,
                "text": tokenizer.decode(new),
                "length": len(new),
                "finished": finished,
                "message": None,
                "duration_seconds": time.perf_counter() - start,
            }
        )
    return records


def _loaded_engine(args: NeoXArgs, place: Place, whereabouts: Whereabouts) -> tuple[PipelineEngine, Path]:
    model = build_model(args, place.device)
    world = dist.group.WORLD
    assert world is not None
    folder = load_weights(model, args, world)
    engine = build_inference_engine(args, model)
    run_inside(engine, Phases(whereabouts, place.device).during)  # progress, for the watchdog
    return engine, folder


def _prompts(args: NeoXArgs) -> list[str]:
    if not args.sample_input_file:
        return [""] * args.num_samples
    path = Path(args.sample_input_file)
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(
            f"sample_input_file {path}: {error.strerror}; give a text file with one prompt a line"
        ) from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"sample_input_file {path} has no prompt; write one a line")
    return prompts


def _write_samples(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    for record in records:
        print(f"{record['context']!r} -> {record['text']!r}")
    print(f"written to {path}")
