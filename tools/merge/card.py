"""Files written alongside the merged weights: the model card, the recipe without local paths, the report, licenses.

None of them depends on the machine, the threads or the shards, so two merges of the same parents give equal folders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..convert_hf.sources.side_files import side_files
from .masks import SCHEME
from .parameters import Setting
from .parents import Parent
from .recipe import DARE, ModelEntry, ParentEntry, Recipe
from .report import WORKING_RANGE, MergeReport, table

CARD, RECIPE, REPORT = "README.md", "merge.yml", "merge_report.json"
_LICENSE_FILE = re.compile(r"(licen[sc]e|notice|use_policy|copying)([._ -].*)?", re.IGNORECASE)
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*\n", re.DOTALL)


def portable_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that names models by label: anyone with folders of these names can repeat the merge."""
    body: dict[str, Any] = {"merge_method": recipe.method}
    if recipe.name:
        body["name"] = recipe.name
    if recipe.base is not None:
        body["base_model"] = _entry(recipe.base)
    body["models"] = [_model(model) for model in recipe.models]
    parameters: dict[str, Any] = {key: _plain(setting) for key, setting in sorted(recipe.settings.items())}
    if recipe.method != "slerp":
        parameters["normalize"] = recipe.normalize
    if recipe.method in DARE:
        parameters["rescale"] = False if recipe.rescale == "none" else recipe.rescale
        body["random_seed"] = recipe.seed
    body["parameters"] = parameters
    if recipe.out_dtype:
        body["out_dtype"] = recipe.out_dtype
    if recipe.side_files:
        body["side_files"] = recipe.side_files
    return yaml.safe_dump(body, sort_keys=False, width=110, allow_unicode=True)


def _entry(parent: ParentEntry) -> dict[str, Any]:
    entry: dict[str, Any] = {"model": parent.label.split("+")[0] if parent.adapter else parent.label}
    entry["label"] = parent.label
    if parent.adapter is not None:
        entry["adapter"] = parent.adapter.name
    if parent.adapter_base is not None:
        entry["adapter_base"] = parent.adapter_base
    if parent.license is not None:
        entry["license"] = parent.license
    if parent.given != "{}":
        entry["set"] = json.loads(parent.given)
    return entry


def _model(model: ModelEntry) -> dict[str, Any]:
    entry = _entry(model.parent)
    if model.base is not None:
        entry["base"] = _entry(model.base)
    if model.settings:
        entry["parameters"] = {key: _plain(setting) for key, setting in sorted(model.settings.items())}
    return entry


def _plain(setting: Setting) -> Any:
    rows = [(c.filter, list(c.values) if len(c.values) > 1 else c.values[0]) for c in setting]
    if len(rows) == 1 and rows[0][0] is None:
        return rows[0][1]
    return [{"value": value} if name is None else {"filter": name, "value": value} for name, value in rows]


def license_of(parent: Parent) -> str | None:
    """The license's identifier: from the recipe, else from the front matter of the parent's own card."""
    if parent.entry.license:
        return parent.entry.license
    folder = parent.checkpoint.side_folder
    card = folder / CARD if folder is not None else None
    if card is None or not card.is_file():
        return None
    match = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))
    if match is None:
        return None
    try:
        matter = yaml.safe_load(match[1])
    except yaml.YAMLError:
        return None
    found = matter.get("license_name") or matter.get("license") if isinstance(matter, dict) else None
    return found if isinstance(found, str) else None


def license_files(parents: Sequence[Parent], side: Parent) -> dict[str, Path]:
    """Licenses and notices of all parents, under distinct names; those of `side` are copied with its other files."""
    own = {path.read_bytes() for path in _licenses(side).values()}
    found: dict[str, Path] = {}
    for parent in parents:
        for name, path in _licenses(parent).items():
            text = path.read_bytes()
            if text in own:
                continue
            own.add(text)
            stem, dot, suffix = name.partition(".")
            found[f"{stem}.{slug(parent.label)}{dot}{suffix}"] = path
    return found


def _licenses(parent: Parent) -> dict[str, Path]:
    folder = parent.checkpoint.side_folder
    files = side_files(folder)[0] if folder is not None else {}
    return {name: path for name, path in files.items() if _LICENSE_FILE.fullmatch(name)}


def slug(label: str) -> str:
    """A label as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "--", label)


def model_card(
    recipe: Recipe,
    parents: Mapping[str, Parent],
    report: MergeReport,
    hashes: Mapping[str, str],
    facts: Mapping[str, str],
) -> str:
    """The README.md of a merged model. `facts` are additional lines of its table of facts."""
    licenses = {label: license_of(parent) for label, parent in parents.items()}
    name = recipe.name or "Merged model"
    lines = ["---", *_front_matter(parents, licenses), "---", "", f"# {name}", ""]
    if any(license and license.lower().startswith("llama") for license in licenses.values()):
        lines += ["Built with Llama.", ""]
    lines += [_summary(recipe), "", "## Parents", ""]
    lines += _markdown(_parents_table(recipe, parents, hashes, licenses))
    lines += ["", "SHA-256 of the parent's manifest, or over name, type, shape and CRC-32 of its tensors.", ""]
    lines += ["## How it was made", ""]
    lines += _markdown([["what", "value"], *([key, value] for key, value in facts.items())])
    lines += ["", "```yaml", portable_recipe(recipe).rstrip(), "```", ""]
    lines += ["## What the merge did", ""]
    lines += _markdown(table(report))
    lines += [
        "",
        f"Delta: norm of the difference from {_reference(recipe)}. Cosine: between a model's delta and the merged one. "
        "Conflicting signs: share of elements where two weighted deltas point in opposite directions.",
        "",
    ]
    lines += [f"- {line}" for line in report.warnings(recipe.method in DARE)]
    return "\n".join(lines).rstrip() + "\n"


def _reference(recipe: Recipe) -> str:
    """The model that the report's deltas are relative to."""
    if recipe.base is None:
        return f"`{recipe.models[0].parent.label}`"
    return "the base" if all(model.base is None for model in recipe.models) else "the base, or to the model's own base"


def _front_matter(parents: Mapping[str, Parent], licenses: Mapping[str, str | None]) -> list[str]:
    known = sorted({license for license in licenses.values() if license})
    matter: dict[str, Any] = {
        "base_model": sorted(parents),
        "base_model_relation": "merge",
        "library_name": "transformers",
    }
    if len(known) == 1 and all(licenses.values()):
        matter["license"] = known[0]
    else:
        matter["license"] = "other"
        matter["license_name"] = " and ".join([*known, *(["unknown"] if not all(licenses.values()) else [])])
    matter["tags"] = ["merge"]
    return yaml.safe_dump(matter, sort_keys=False, allow_unicode=True).rstrip().splitlines()


def _summary(recipe: Recipe) -> str:
    names = ", ".join(f"`{model.parent.label}`" for model in recipe.models)
    to = f" on `{recipe.base.label}`" if recipe.base is not None else ""
    return f"A merge of {names}{to} by `{recipe.method}`."


def _parents_table(
    recipe: Recipe, parents: Mapping[str, Parent], hashes: Mapping[str, str], licenses: Mapping[str, str | None]
) -> list[list[str]]:
    rows = [["model", "role", "weight", "density", "license", "SHA-256"]]
    models = {model.parent.label: model for model in recipe.models}
    for label, parent in parents.items():
        model = models.get(label)
        weight = density = ""
        role = "base" if recipe.base is not None and label == recipe.base.label else "base of a model"
        if model is not None:
            scopes = recipe.settings | model.settings
            role = f"delta to `{model.base.label}`" if model.base is not None else "merged"
            weight = _shown(scopes.get("weight"))
            density = _shown(scopes.get("density"))
        digest = hashes[label]
        adapter = parent.adapter_hash()
        rows.append(
            [
                f"`{label}`",
                role,
                weight,
                density,
                licenses[label] or "unknown",
                f"`{digest}`" + (f", adapter `{adapter}`" if adapter else ""),
            ]
        )
    return rows


def _shown(setting: Setting | None) -> str:
    return "" if setting is None else json.dumps(_plain(setting)).strip('"')


def _markdown(rows: list[list[str]]) -> list[str]:
    head, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *body]


def facts_of(recipe: Recipe, side: Parent, types: Sequence[str], command: str) -> dict[str, str]:
    """The rows of the card's table of facts that are derived from the recipe."""
    facts = {"method": f"`{recipe.method}`"}
    if recipe.method in DARE:
        facts["seed"] = str(recipe.seed)
        facts["masks"] = SCHEME
        facts["rescaling"] = {
            "probability": "1 / density",
            "l1": "to the sum of magnitudes before the mask, by tensor",
            "none": "none",
        }[recipe.rescale]
        facts["working range for warnings"] = str(WORKING_RANGE)
    if recipe.method != "slerp":
        facts["normalized"] = "yes" if recipe.normalize else "no"
    facts["arithmetic"] = "fp32, models in the order of their labels, one rounding"
    facts["stored as"] = ", ".join(types)
    facts["tokenizer and configuration"] = f"`{side.label}`"
    facts["command"] = f"`{command}`"
    return facts


def report_json(recipe: Recipe, report: MergeReport, hashes: Mapping[str, str]) -> bytes:
    """merge_report.json."""
    body = {
        "method": recipe.method,
        "seed": recipe.seed if recipe.method in DARE else None,
        "masks": SCHEME if recipe.method in DARE else None,
        "parents": dict(hashes),
        "kinds": report.to_json(),
    }
    return (json.dumps(body, indent=1) + "\n").encode()


def check_name(recipe: Recipe, parents: Mapping[str, Parent]) -> list[str]:
    """Remarks on unknown licenses, and on a name that breaks Llama's naming rule."""
    licenses = {label: license_of(parent) for label, parent in parents.items()}
    remarks = []
    unknown = [label for label, license in licenses.items() if license is None]
    if unknown:
        remarks.append(f"unknown license of {', '.join(unknown)}: add `license: NAME` to the model's entry")
    llama = any(license and license.lower().startswith("llama") for license in licenses.values())
    if llama and recipe.name and not recipe.name.lower().startswith("llama"):
        remarks.append(f"Llama's license requires the name of a derived model to begin with Llama, not {recipe.name!r}")
    return remarks
