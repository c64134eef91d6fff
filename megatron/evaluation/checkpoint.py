"""`eval.py` on every rank: loads a checkpoint, evaluates what the keys request, and reports the results."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron.checkpoint.load import load_weights
from megatron.common.atomic_files import write_text
from megatron.common.log import log_on_rank_0
from megatron.data.build import build_datasets
from megatron.engine.build import build_inference_engine
from megatron.evaluation.documents import evaluate_documents
from megatron.evaluation.driver import DrivenModel
from megatron.evaluation.multiple_choice.report import accuracy, share_text
from megatron.evaluation.perplexity import Evaluation, evaluate_all
from megatron.evaluation.session import with_checkpoint
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.process_groups import initialize
from megatron.supervision.step_timers import StepTimers
from megatron.supervision.watchdog import Watchdog

logger = logging.getLogger(__name__)


def evaluate_checkpoint(args: NeoXArgs) -> None:
    """Evaluate the validation sets, or instead the documents and lm-eval tasks that the keys name. Collective."""
    if args.eval_tasks or args.eval_documents:
        with_checkpoint(args, evaluate_texts)
    else:
        _evaluate_validation_sets(args)


def _evaluate_validation_sets(args: NeoXArgs) -> None:
    """Print validation loss and perplexity of every source, over its whole set, and write them as JSON."""
    place = initialize(args)
    log_on_rank_0(place.rank)
    with Watchdog(args, place) as watchdog:
        datasets = build_datasets(args)
        for note in datasets.notes:
            logger.info(note)
        # The phases count as progress for the watchdog.
        engine = build_inference_engine(args, place, StepTimers(watchdog.whereabouts, place.device).during)
        folder = load_weights(engine, args)
        results = evaluate_all(engine, args, datasets.valid)
    if place.rank == 0:
        _report_sources(args, folder, results)


def _report_sources(args: NeoXArgs, folder: Path, results: Mapping[str, Evaluation]) -> None:
    for name, result in results.items():
        print(f"{name} | {result.text(args, digits=6)} in {result.samples} samples")
    facts = {
        name: asdict(r) | ({} if args.reads_images else {"perplexity": r.perplexity}) for name, r in results.items()
    }
    _write_report(args, folder, {"results": facts})


def evaluate_texts(model: DrivenModel, checkpoint: Path) -> dict[str, Any]:
    """The program of rank 0: documents, then tasks; returns what it adds to eval_results.json."""
    args = model.args
    report: dict[str, Any] = {}
    prefix = args.eval_results_prefix
    Path(f"{prefix}x").parent.mkdir(parents=True, exist_ok=True)
    if args.eval_documents:
        report["documents"] = evaluate_documents(model, Path(f"{prefix}documents.jsonl"))
        for source, facts in report["documents"].items():
            print(
                f"{source} | loss {facts['loss']:.6f} | perplexity {facts['perplexity']:.3f} | "
                f"{facts['bits_per_byte']:.4f} bits per byte | {facts['tokens']} tokens, {facts['bytes']} bytes in "
                f"{facts['documents']} documents"
            )
    if args.eval_tasks:
        report |= _tasks(model)
    report["tokens"] = model.tokens
    _write_report(args, checkpoint, report)
    return report


def _tasks(model: DrivenModel) -> dict[str, Any]:
    from megatron.evaluation.lm_eval_model import run_tasks

    prefix = model.args.eval_results_prefix
    results, lm = run_tasks(model)
    wilson = {}
    for task, samples in results["samples"].items():
        lines = (json.dumps(sample, default=str, ensure_ascii=False) for sample in samples)
        write_text(Path(f"{prefix}samples_{task}.jsonl"), "".join(line + "\n" for line in lines))
        verdicts = [sample.get("acc", sample.get("exact_match")) for sample in samples]
        if verdicts and all(verdict in (0, 1) for verdict in verdicts):
            wilson[task] = accuracy(bool(verdict) for verdict in verdicts)
    write_text(Path(f"{prefix}requests.jsonl"), "".join(json.dumps(one) + "\n" for one in lm.log))
    for task, metrics in results["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float) and "stderr" not in name:
                print(f"{task} | {name.removesuffix(',none')} {value:.6f}")
        if task in wilson:
            print(f"{task} | {share_text(wilson[task])}")
    return {
        "tasks": results["results"],
        "wilson": wilson,
        "task_versions": results["versions"],
        "few_shot": results["n-shot"],
        "n_samples": results["n-samples"],
        "requests_cut": lm.cut,
        "requests_joined_differently": lm.joined_differently,
        "lm_eval": version("lm_eval"),
    }


def _write_report(args: NeoXArgs, checkpoint: Path, content: dict[str, Any]) -> None:
    report = {"checkpoint": str(checkpoint), "precision": args.precision, **content}
    path = Path(f"{args.eval_results_prefix}eval_results.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(report, indent=1, default=str) + "\n")
    print(f"written to {path}")
