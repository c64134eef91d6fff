"""The model card: recipe, sources, evaluation and its protocol, compute, limitations, and how to verify the release."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from tools.release.recipe import ReleaseRecipe

_RECIPE_KEYS = (
    *("seq_length", "train_epochs", "optimizer", "weight_decay", "gradient_clipping", "lr_decay_style", "warmup"),
    *("lr_warmup_iters", "lr_wsd_decay_iters", "min_lr", "lr_overrides", "pack_impl", "isolate_documents", "seed"),
)


def model_card(recipe: ReleaseRecipe, provenance: Mapping[str, Any]) -> str:
    """The README.md of a release."""
    matter: dict[str, Any] = {"license": recipe.license}
    if recipe.base_models:
        matter["base_model"] = recipe.base_models
    parts = ["---", yaml.safe_dump(matter, sort_keys=False).rstrip(), "---", "", f"# {recipe.name}", ""]
    if recipe.license.lower().startswith("llama"):
        parts += ["Built with Llama.", ""]
    parts += ["## How it was trained", ""]
    for stage in provenance["stages"]:
        parts += _stage(stage)
    if recipe.merge is not None:
        parts += ["It was then merged; `merge.yml` is the recipe and `merge_report.json` the report of the merge.", ""]
    parts += ["## Data", "", *_data(provenance), ""]
    if recipe.evaluation:
        parts += ["## Evaluation", "", *_evaluation(provenance["evaluation"]), ""]
    parts += ["## Compute", "", *_compute(provenance["stages"], recipe.machine), ""]
    parts += ["## Limitations", "", recipe.limitations.strip(), ""]
    parts += [
        *(
            "## Check this release",
            "",
            "```bash",
            "python tools/release verify . --data FOLDER_WITH_THE_DATA",
            "```",
            "",
        ),
        "`provenance.json` has the SHA-256 of every file here and of the training data, each stage's configuration, "
        "and the content of every recorded step. The command checks the files and, given the data, rereads steps and "
        f"compares token ids and documents. Made by NeoX-Llama at commit {provenance['commit'] or 'unknown'}.",
        "",
    ]
    return "\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]


def _stage(stage: Mapping[str, Any]) -> list[str]:
    config = stage["config"]
    rows: list[Sequence[object]] = [("steps", f"{stage['first_step']} to {stage['checkpoint']['iteration']}")]
    rows += [("sequences in a step", stage["batch"]), ("precision", stage["precision"])]
    rows += [(key, config[key]) for key in _RECIPE_KEYS if config.get(key) is not None]
    layout = stage["layout"] or {}
    rows.append(("layout", ", ".join(f"{name.upper()} {size}" for name, size in layout.items())))
    return [f"### {stage['name']}", "", *_table(("key", "value"), rows), ""]


def _data(provenance: Mapping[str, Any]) -> list[str]:
    rows = []
    for stage in provenance["stages"]:
        data = stage["data"] or [{"source": name, "samples": None} for name in stage["sources"]]
        total = sum(one["samples"] or 0 for one in data)
        for one in data:
            facts = provenance["data"][one["source"]]
            share = f"{100 * one['samples'] / total:.1f} %" if one["samples"] is not None and total else "-"
            sha = next(file["sha256"] for name, file in facts["files"].items() if name.endswith(".bin"))
            rows.append(
                (
                    *(stage["name"], one["source"], share, facts.get("documents", "-"), facts.get("tokens", "-")),
                    *(facts["license"] or "unknown", facts["origin"] or "-", f"`{sha[:16]}`"),
                )
            )
    head = (
        "stage",
        "source",
        "share",
        "documents",
        "tokens",
        "license",
        "origin",
        "SHA-256 of the tokens (first digits)",
    )
    return _table(head, rows)


def _evaluation(tests: Sequence[Mapping[str, Any]]) -> list[str]:
    rows, notes = [], []
    for test in tests:
        if "accuracy" not in test:
            rows += [(test["name"], source, "-", f"loss {loss:.4f}", "-") for source, loss in test["losses"].items()]
            continue
        parts = {"all": test, **test.get("topics", {})}
        for topic, one in parts.items():
            low, high = one["wilson_95"]
            interval = f"{100 * low:.1f} to {100 * high:.1f}"
            rows.append((test["name"], topic, one["n"], f"{100 * one['accuracy']:.1f} %", interval))
        asked = ", ".join(f"{key} {value}" for key, value in test["protocol"].items() if value not in (None, 0, False))
        notes.append(f"- {test['name']}: {asked}; {test['precision']}; questions SHA-256 `{test['questions_sha256']}`.")
    return [*_table(("test", "part", "n", "result", "95 % (Wilson)"), rows), "", "Protocol:", "", *notes]


def _compute(stages: Sequence[Mapping[str, Any]], machine: str) -> list[str]:
    rows = []
    for stage in stages:
        one = stage["compute"]
        if one is None:
            rows.append((stage["name"], "no logs", "-", "-", "-"))
            continue
        hours = one["hours"] * one["ranks"]
        rows.append(
            (stage["name"], f"{one['steps']:,}", f"{one['tokens']:,}", f"{hours:.3g}", f"{one['model_flops']:.3g}")
        )
    head = ("stage", "steps", "tokens (with padding)", "rank-hours", "model FLOPs (Megatron formula)")
    return [*_table(head, rows), *(["", f"Machine: {machine}."] if machine else [])]
