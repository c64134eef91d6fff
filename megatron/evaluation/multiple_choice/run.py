"""`mcq.py`: asks a checkpoint a file of questions and writes a folder of results."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.common.atomic_files import write_text
from megatron.common.errors import UserError
from megatron.evaluation.driver import DrivenModel
from megatron.evaluation.multiple_choice.ask import ask_all
from megatron.evaluation.multiple_choice.items import LETTERS, Item, read_items
from megatron.evaluation.multiple_choice.prompts import PromptWriter, joined_differently
from megatron.evaluation.multiple_choice.records import ItemResult, read_verdicts, write_results
from megatron.evaluation.multiple_choice.report import comparison_facts, lines_of, summarize
from megatron.evaluation.multiple_choice.statistics import compare_paired
from megatron.evaluation.prompts import PromptEncoder
from megatron.evaluation.scoring import Pair
from megatron.evaluation.session import with_checkpoint
from megatron.neox_arguments import NeoXArgs
from megatron.neox_arguments.keys.evaluation import McqKeys


def answer_questions(args: NeoXArgs) -> None:
    """Ask every question and write items.jsonl, summary.json and, if answers are withheld, submission.csv."""
    with_checkpoint(args, ask_and_write)


def ask_and_write(model: DrivenModel, checkpoint: Path) -> dict[str, Any]:
    """The program of rank 0; returns the summary."""
    args, keys = model.args, model.args.mcq
    assert keys.items is not None  # checked with the configuration
    start = time.perf_counter()
    items = read_items(keys.items, keys)[: keys.limit]
    before = _verdicts_before(keys, items)
    shots = _shots(keys, items)
    writer = PromptWriter(keys, PromptEncoder.of(args, chat=args.chat), shots, args.system_prompt, args.thinking)
    folder = Path(keys.output)
    _make(folder)
    results = ask_all(model, writer, items)
    summary = summarize(results)
    if before is not None:
        comparison = compare_paired([before[r.item.number] for r in results], [r.correct for r in results])
        summary["comparison"] = {"with": keys.compare_with, **comparison_facts(comparison)}
    summary |= {
        "checkpoint": str(checkpoint),
        "questions": {"file": keys.items, "sha256": hashlib.sha256(Path(keys.items).read_bytes()).hexdigest()},
        "precision": args.precision,
        "protocol": {
            **keys.model_dump(exclude={"items", "output", "compare_with"}),
            **{name: getattr(args, name) for name in ("chat", "system_prompt", "thinking", "max_thinking_tokens")},
        },
        "chat": None if writer.encoder.chat is None else writer.encoder.chat.name,
        "tokenizer": writer.encoder.tokenizer.fingerprint,
        "joined_differently": _joined_differently(writer, results),
        "tokens": model.tokens,
        "seconds": time.perf_counter() - start,
        "first_prompt": writer.encoder.tokenizer.decode(results[0].asked[0].prompt_ids),
    }
    write_results(folder / "items.jsonl", results)
    write_text(folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    if items[0].answer is None:
        write_text(folder / "submission.csv", submission(results))
    _print(summary, folder, withheld=items[0].answer is None)
    return summary


def submission(results: Sequence[ItemResult]) -> str:
    """A CSV with one letter per row, in the order of the questions; empty if no answer could be parsed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "answer"])
    for result in results:
        writer.writerow([result.item.number, "" if result.choice is None else LETTERS[result.choice]])
    return text.getvalue()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"mcq.output {folder}: {error.strerror}") from None


def _shots(keys: McqKeys, items: Sequence[Item]) -> list[Item]:
    """The first `shots` items of `shots_file` that have answers and are not among the asked `items`."""
    if keys.shots_file is None:
        return []
    asked = {item.question for item in items}
    usable = [
        item for item in read_items(keys.shots_file, keys) if item.answer is not None and item.question not in asked
    ]
    if len(usable) < keys.shots:
        raise UserError(
            f"mcq.shots is {keys.shots}, {keys.shots_file} has {len(usable)} questions with an answer that are not "
            f"asked themselves"
        )
    return usable[: keys.shots]


def _verdicts_before(keys: McqKeys, items: Sequence[Item]) -> dict[int, bool] | None:
    if keys.compare_with is None:
        return None
    if items[0].answer is None:
        raise UserError(f"mcq.compare_with needs right answers, {keys.items} has none")
    before = read_verdicts(Path(keys.compare_with))
    if set(before) != {item.number for item in items}:
        raise UserError(
            f"{keys.compare_with} is of {len(before)} items, {len(items)} are asked here; a paired test needs the same"
        )
    return before


def _joined_differently(writer: PromptWriter, results: Sequence[ItemResult]) -> int:
    """Number of continuations that would be tokenized differently together with their prompts."""
    pairs = (Pair(one.prompt_ids, ids) for result in results for one in result.asked for ids in one.continuations)
    return sum(joined_differently(writer.encoder, pair) for pair in pairs)


def _print(summary: dict[str, Any], folder: Path, withheld: bool) -> None:
    print("\n".join(lines_of(summary)))
    if summary["joined_differently"]:
        print(
            f"warning: {summary['joined_differently']} continuations would be other tokens if they were one text with "
            f"their prompt; the scored tokens are ones that the model has not seen in that position"
        )
    print(f"{summary['tokens']} tokens in {summary['seconds']:.1f} s")
    names = "items.jsonl, summary.json" + (", submission.csv" if withheld else "")
    print(f"written to {folder}: {names}")
