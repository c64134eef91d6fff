"""What `eval.py` does on every rank: load a checkpoint, evaluate every validation source, report."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

from megatron.checkpoint.load import load_weights
from megatron.common.log import log_on_rank_0
from megatron.data.build import build_datasets
from megatron.engine.build import build_inference_engine
from megatron.evaluation.perplexity import evaluate_all
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.process_groups import initialize
from megatron.supervision.step_timers import StepTimers
from megatron.supervision.watchdog import Watchdog

logger = logging.getLogger(__name__)


def evaluate_checkpoint(args: NeoXArgs) -> None:
    """Validation loss and perplexity of every source, over the whole set, printed and written as JSON."""
    place = initialize(args)
    log_on_rank_0(place.rank)
    with Watchdog(args, place) as watchdog:
        datasets = build_datasets(args)
        for note in datasets.notes:
            logger.info(note)
        # The phases are progress, for the watchdog.
        engine = build_inference_engine(args, place, StepTimers(watchdog.whereabouts, place.device).during)
        folder = load_weights(engine, args)
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
