"""The results of a run of the small AstroSage, with intervals and exact tests.

    python examples/astrosage/results.py RUN_DIR [RUN_DIR ...]

Prints one run, or several seeds side by side and pooled. Intervals are Wilson's at 95 %. The tests are exact: a
binomial test of the base model against chance, McNemar's of two stages on the same questions, Fisher's of the objects
described in the documents against those in no text.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from scipy.stats import binomtest, fisher_exact

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.astrosage.facts import ATTRIBUTION  # noqa: E402
from megatron.evaluation.multiple_choice.statistics import compare_paired, wilson_interval  # noqa: E402

CHANCE = 0.25
STAGES = {
    "base": "base",
    "cpt": "CPT",
    "sft": "SFT",
    "merge": "merge",
    "merge_own_base": "merge, own bases",
    "lora": "CPT by LoRA",
}
TOPICS = {
    "held": "told, known wording",
    "held_new_wording": "told, new wording",
    "control": "in no text, known wording",
    "control_new_wording": "in no text, new wording",
    "general": "general",
}
Verdicts = dict[str, dict[str, list[bool]]]  # by stage and topic


def verdicts(out: Path) -> Verdicts:
    """Which questions each stage answered correctly."""
    found: Verdicts = {}
    for stage in STAGES:
        path = out / "mcq" / stage / "items.jsonl"
        if not path.exists():
            continue
        found[stage] = verdicts_of(path)
    return found


def verdicts_of(items: Path) -> dict[str, list[bool]]:
    """Which questions of each topic were answered correctly; `items` is mcq.py's items.jsonl."""
    found: dict[str, list[bool]] = {}
    for line in items.read_text().splitlines():
        item = json.loads(line)
        found.setdefault(item["topic"], []).append(item["correct"])
    return found


def against_control_p(told: list[bool], untold: list[bool]) -> float:
    """Fisher's exact one-sided p that told facts are answered correctly no more often than facts in no text."""
    table = [[sum(part), len(part) - sum(part)] for part in (told, untold)]
    return float(fisher_exact(table, alternative="greater").pvalue)


def pooled(runs: list[Verdicts]) -> Verdicts:
    """All runs as one; each has its own facts, so that no question occurs twice."""
    return {
        stage: {topic: [one for run in runs for one in run[stage][topic]] for topic in TOPICS}
        for stage in runs[0]
        if all(stage in run for run in runs)
    }


def tests(found: Verdicts) -> dict[str, Any]:
    """The p-values of the exact tests, and the points lost on general facts."""
    base, cpt = found["base"], found["cpt"]
    facts: dict[str, Any] = {}
    for wording in ("", "_new_wording"):
        held, control = f"held{wording}", f"control{wording}"
        pair = compare_paired(base[held], cpt[held])
        chance = binomtest(sum(base[held]), len(base[held]), CHANCE)
        facts[held] = {
            "base_against_chance_p": chance.pvalue,
            "gained": pair.gained,
            "lost": pair.lost,
            "cpt_against_base_p": pair.p_value,
            "cpt_against_control_p": against_control_p(cpt[held], cpt[control]),
        }
    general = {stage: sum(topics["general"]) / len(topics["general"]) for stage, topics in found.items()}
    facts["general_points_lost"] = {stage: 100 * (general["base"] - share) for stage, share in general.items()}
    return facts


def completed(out: Path) -> tuple[int, int]:
    """(right, all): sentences that the model after CPT completed, with the right constellation and in all."""
    lines = [json.loads(line) for line in (out / "completed.jsonl").read_text().splitlines()]
    right = sum(line["text"].strip().startswith(line["input"]["constellation"] + ".") for line in lines)
    return right, len(lines)


def layouts_agree(out: Path) -> tuple[float, int]:
    """(largest difference of an option's score, number of differing choices) between TP1 and TP2."""
    worst, other = 0.0, 0
    files = [(out / "mcq" / name / "items.jsonl").read_text().splitlines() for name in ("cpt", "cpt_tp2")]
    for lines in zip(*files, strict=True):
        one, two = map(json.loads, lines)
        scores = [[sum(option) for option in item["asked"][0]["log_probs"]] for item in (one, two)]
        worst = max(worst, *(abs(a - b) for a, b in zip(*scores, strict=True)))
        other += one["choice"] != two["choice"]
    return worst, other


def share_text(right: int, n: int) -> str:
    low, high = wilson_interval(right, n)
    return f"{100 * right / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def table(runs: list[Verdicts], whole: Verdicts) -> str:
    """Accuracies in percent: pooled, with interval, and of each run if there are several."""
    lines = ["| accuracy, % | " + " | ".join(TOPICS.values()) + " |", "|---" * (len(TOPICS) + 1) + "|"]
    for stage, topics in whole.items():
        cells = []
        for topic in TOPICS:
            cell = share_text(sum(topics[topic]), len(topics[topic]))
            if len(runs) > 1:
                each = [f"{100 * sum(run[stage][topic]) / len(run[stage][topic]):.0f}" for run in runs]
                cell += f" ({', '.join(each)})"
            cells.append(cell)
        lines.append(f"| {STAGES[stage]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(folders: list[Path]) -> str:
    """The results of one or several runs as Markdown."""
    runs = [verdicts(folder) for folder in folders]
    whole = pooled(runs)
    facts = tests(whole)
    lines = [table(runs, whole), ""]
    for wording, name in (("held", "known wording"), ("held_new_wording", "new wording")):
        one = facts[wording]
        lines += [
            f"- Told objects, {name}: base against chance p = {one['base_against_chance_p']:.2g}; CPT against base: "
            f"{one['gained']} gained, {one['lost']} lost, exact McNemar p = {one['cpt_against_base_p']:.2g}; CPT "
            f"against objects in no text: Fisher's exact p = {one['cpt_against_control_p']:.2g}."
        ]
    lost = ", ".join(f"{STAGES[stage]} {points:.1f}" for stage, points in facts["general_points_lost"].items())
    lines.append(f"- General facts, points lost against the base model: {lost}.")
    ended = [completed(folder) for folder in folders]
    lines.append(
        f"- Sentences that begin like those of the documents, completed with the right constellation after CPT: "
        f"{share_text(sum(a for a, _ in ended), sum(b for _, b in ended))} %."
    )
    layouts = [layouts_agree(folder) for folder in folders]
    lines.append(
        f"- Scores on two tensor-parallel ranks against one: largest difference {max(a for a, _ in layouts):.1e}, "
        f"{sum(b for _, b in layouts)} choices differ."
    )
    checks = [json.loads((folder / "check.json").read_text()) for folder in folders]
    lines += [
        f"- Scores of {STAGES[name]} against transformers on the export: largest difference "
        f"{max(check[name]['largest_difference'] for check in checks):.1e}, "
        f"{sum(check[name]['other_choices'] for check in checks)} choices differ, "
        f"{sum(check[name]['other_prompts'] for check in checks)} prompts differ."
        for name in checks[0]
    ]
    return "\n".join(lines)


def write_results(out: Path, *, seconds: float, seed: int) -> str:
    """Write results.md and results.json of one run; returns the text."""
    text = f"{report([out])}\n\n{ATTRIBUTION}"
    found = verdicts(out)
    counts = {
        stage: {topic: [sum(part), len(part)] for topic, part in topics.items()} for stage, topics in found.items()
    }
    content = {
        "seed": seed,
        "seconds": seconds,
        "counts": counts,
        "tests": tests(found),
        "completed": completed(out),
        "layouts": layouts_agree(out),
        "transformers": json.loads((out / "check.json").read_text()),
    }
    (out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    (out / "results.md").write_text(text + "\n")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR")
    print(report(parser.parse_args().runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
