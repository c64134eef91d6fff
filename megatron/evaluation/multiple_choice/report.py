"""The results of a multiple-choice test: numbers with their uncertainty, as JSON and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from megatron.evaluation.multiple_choice.ask import calibrated
from megatron.evaluation.multiple_choice.items import LETTERS
from megatron.evaluation.multiple_choice.records import ItemResult
from megatron.evaluation.multiple_choice.statistics import (
    PairedComparison,
    calibration_error,
    softmax,
    wilson_interval,
)


def accuracy(correct: Iterable[bool]) -> dict[str, Any]:
    """Counts `n` and `correct`, `accuracy` (None without items), and its 95 % Wilson interval."""
    verdicts = list(correct)
    right, n = sum(verdicts), len(verdicts)
    return {
        "n": n,
        "correct": right,
        "accuracy": right / n if n else None,
        "wilson_95": list(wilson_interval(right, n)),
    }


def summarize(results: Sequence[ItemResult]) -> dict[str, Any]:
    """All numbers of a test. If answers are withheld, only what was chosen, and what could not be parsed."""
    asked = [one for result in results for one in result.asked]
    chosen = Counter(None if r.choice is None else LETTERS[r.choice] for r in results)
    letters = Counter(LETTERS[one.order.index(one.choice)] for one in asked if one.choice is not None)
    summary: dict[str, Any] = {
        "items": len(results),
        "times_asked": len(asked),
        "unparsed_items": chosen.pop(None, 0),
        "chosen_letters": dict(sorted(letters.items())),
    }
    if asked and asked[0].parsed_by:
        summary["read_by"] = dict(Counter(one.parsed_by for one in asked))
        summary["without_an_end"] = sum(not one.ended for one in asked)
        if any(one.thinking for one in asked):
            summary["thinking"] = dict(Counter(one.thinking for one in asked))
    if not results or results[0].item.answer is None:
        return summary
    summary |= accuracy(result.correct for result in results)
    summary["answers"] = dict(sorted(Counter(LETTERS[r.item.answer or 0] for r in results).items()))
    topics = sorted({r.item.topic for r in results if r.item.topic is not None})
    if topics:
        summary["topics"] = {t: accuracy(r.correct for r in results if r.item.topic == t) for t in topics}
    if asked[0].scores:
        summary["calibration_error"] = calibration_error(*_confidences(results))
    if asked[0].alone:
        summary["by_sum"] = accuracy(_best(one.sums, one.order) == r.item.answer for r in results for one in r.asked)
        summary["by_calibrated"] = accuracy(
            _best(calibrated(one), one.order) == r.item.answer for r in results for one in r.asked
        )
    if any(len(result.asked) > 1 for result in results):
        summary["orders"] = _orders(results)
    return summary


def _best(scores: Sequence[float], order: Sequence[int]) -> int:
    """The item's option with the highest of `scores`, which are in order of letters."""
    return order[max(range(len(scores)), key=scores.__getitem__)]


def _confidences(results: Sequence[ItemResult]) -> tuple[list[float], list[bool]]:
    confidences = []
    for result in results:
        assert result.choice is not None
        shares = [softmax(one.scores)[result.choice] for one in result.asked]
        confidences.append(sum(shares) / len(shares))
    return confidences, [result.correct for result in results]


def _orders(results: Sequence[ItemResult]) -> dict[str, Any]:
    """Accuracy in each cyclic order, and the number of items with the same answer in all of them."""
    most = max(len(result.asked) for result in results)
    by_shift = [
        accuracy(r.asked[shift].choice == r.item.answer for r in results if shift < len(r.asked))
        for shift in range(most)
    ]
    same = sum(len({one.choice for one in result.asked}) == 1 for result in results)
    return {"by_shift": by_shift, "items_with_one_answer_in_all": same}


def comparison_facts(comparison: PairedComparison) -> dict[str, Any]:
    return {
        "items": comparison.n,
        "correct_before": comparison.before,
        "correct_now": comparison.after,
        "gained": comparison.gained,
        "lost": comparison.lost,
        "negative_flip_rate": comparison.negative_flip_rate,
        "mcnemar_exact_p": comparison.p_value,
    }


def lines_of(summary: dict[str, Any]) -> list[str]:
    """The lines in which a summary is printed."""
    lines = []
    if "accuracy" in summary:
        lines.append(f"accuracy {share_text(summary)}")
        lines += [f"  {topic}: {share_text(one)}" for topic, one in summary.get("topics", {}).items()]
    for name, title in (("by_sum", "by log-probability"), ("by_calibrated", "calibrated")):
        if name in summary:
            lines.append(f"  {title}: {share_text(summary[name])}")
    if "calibration_error" in summary:
        lines.append(f"calibration error {summary['calibration_error']:.3f}")
    if "orders" in summary:
        shifts = ", ".join(f"{100 * one['accuracy']:.1f} %" for one in summary["orders"]["by_shift"])
        same = summary["orders"]["items_with_one_answer_in_all"]
        lines.append(f"by order of the options: {shifts}; {same} of {summary['items']} items with one answer in all")
    lines.append("letters chosen: " + ", ".join(f"{k} {v}" for k, v in summary["chosen_letters"].items()))
    if "read_by" in summary:
        lines.append("answers read by: " + ", ".join(f"{k} {v}" for k, v in sorted(summary["read_by"].items())))
        lines.append(f"texts without an end: {summary['without_an_end']}")
    if "thinking" in summary:
        lines.append("reasoning: " + ", ".join(f"{k} {v}" for k, v in sorted(summary["thinking"].items())))
    lines.append(f"items without an answer that could be read: {summary['unparsed_items']}")
    if "comparison" in summary:
        one = summary["comparison"]
        lines.append(
            f"against {one['with']}: {one['correct_before']} -> {one['correct_now']} of {one['items']}, gained "
            f"{one['gained']}, lost {one['lost']} (negative flips {100 * one['negative_flip_rate']:.1f} %), exact "
            f"McNemar p = {one['mcnemar_exact_p']:.3g}"
        )
    return lines


def share_text(one: dict[str, Any]) -> str:
    """The result of `accuracy` as text: `86.2 % (3814 of 4425), 95 % 85.1 to 87.2`."""
    low, high = one["wilson_95"]
    return f"{100 * one['accuracy']:.1f} % ({one['correct']} of {one['n']}), 95 % {100 * low:.1f} to {100 * high:.1f}"
