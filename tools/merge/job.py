"""Run a merge: check the recipe and its parents, measure tensors, then write the folder with the converter's plan."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..convert_hf.commands.convert import ConversionRequest, prepare_hf, prepare_neox
from ..convert_hf.formats.dtypes import BY_NAME
from ..convert_hf.sources.checkpoint import Checkpoint
from ..convert_hf.sources.neox import SIDE
from ..convert_hf.stream.publish import OutputFolder
from ..convert_hf.stream.tensor_map import Logical, rows_and_columns
from .arithmetic import TensorPlan, Term
from .bands import TILE, MergedBands
from .card import CARD, RECIPE, REPORT, check_name, facts_of, license_files, model_card, report_json
from .card import portable_recipe as recipe_text
from .compatibility import check_parents, check_replicas
from .errors import MergeError
from .masks import RESOLUTION, SCHEME, mask_key, threshold
from .measure import Wanted, measure
from .parameters import unused_filters
from .parents import Parent, open_parents
from .recipe import DARE, ELECTS_SIGN, Recipe
from .report import MergeReport

WRITTEN_BY = "tools/merge"
_MEMORY_BASE = 304 << 20  # interpreter, torch and tables
_LARGEST_BAND, _SMALLEST_BAND = 4 << 20, 64 << 10


@dataclass
class MergeRequest:
    """The command-line options of a merge."""

    output: Path
    tp: int | None = None  # number of ranks of NeoX layer files; None: a Hugging Face folder
    divisible_by: int | None = None
    shard_size: int | None = None
    max_ram: int = 1 << 30
    threads: int = 4
    shard: tuple[int, int] = (1, 1)
    resume: bool = False
    force: bool = False
    tile: int = TILE
    command: str = "python tools/merge merge.yml"


class MergeJob:
    """An opened and checked merge. Only headers and small files are read before `run` or `bands`."""

    def __init__(self, recipe: Recipe, request: MergeRequest) -> None:
        torch.set_num_threads(1)  # the merge runs its own threads
        self.recipe, self.request = recipe, request
        self.parents = open_parents(recipe)
        self.notes = [f"{p.label}: {note}" for p in self.parents.values() for note in p.checkpoint.notes]
        self.notes += recipe.notes + check_parents(self.parents) + check_name(recipe, self.parents)
        self._order = list(self.parents.values())
        self.first = self._order[0]
        self.side = self._side_parent()
        self.wanted = self._plans()
        self.merged = self._merged_checkpoint()
        self.band, self.threads = self._memory()
        self._prefix = ""
        self.report: MergeReport | None = None  # of all shares; set where the last share finished
        self.output = self._output_folder()

    # --- inputs

    def _side_parent(self) -> Parent:
        """The parent whose tokenizer, chat template and configuration the merged model gets."""
        if self.recipe.side_files is not None:
            return self.parents[self.recipe.side_files]
        chatting = [m for m in self.recipe.models if _has_chat_template(self.parents[m.parent.label])]
        if not chatting:
            base = self.recipe.base or self.recipe.models[0].parent
            return self.parents[base.label]
        labels = [m.parent.label for m in self.recipe.models]
        weights = dict(zip(labels, self.final_norm_weights(), strict=True))
        return self.parents[max(chatting, key=lambda m: weights[m.parent.label]).parent.label]

    def final_norm_weights(self) -> tuple[float, ...]:
        """The models' weights for the final norm, which apply to all tensors if the recipe has no filters or lists."""
        return self.recipe.tensor_settings("model.norm.weight", self.first.checkpoint.shape.num_layers).weights

    def _plans(self) -> dict[str, Wanted]:
        """The plan of every tensor, as far as it is known before any weights are read."""
        recipe, tensors = self.recipe, self.first.checkpoint.tensors
        place = {label: i for i, label in enumerate(self.parents)}
        base = place[recipe.base.label] if recipe.base is not None else -1
        wanted = {}
        active: set[str] = set()
        for name in tensors:
            settings = recipe.tensor_settings(name, self.first.checkpoint.shape.num_layers)
            terms = []
            for model, weight, density in zip(recipe.models, settings.weights, settings.densities, strict=True):
                label = model.parent.label
                if weight or recipe.method == "slerp":
                    active.add(label)
                own = place[model.base.label] if model.base is not None else base
                terms.append(self._term(name, label, place[label], own, weight, density))
            plan = TensorPlan(
                method=recipe.method,
                terms=tuple(terms),
                base=base,
                normalize=recipe.normalize,
                elects=recipe.method in ELECTS_SIGN,
                scale=settings.scale,
            )
            wanted[name] = Wanted(
                plan,
                densities=settings.densities if recipe.method == "ties" else (),
                l1=recipe.rescale == "l1",
                t=settings.t if recipe.method == "slerp" else None,
            )
            if recipe.method == "linear" and recipe.normalize and abs(sum(settings.weights)) < 1e-8:
                raise MergeError(
                    f"tensor {name}: the weights add up to {sum(settings.weights):g}, so they cannot be normalized"
                )
        for model in recipe.models:
            if model.parent.label not in active:
                raise MergeError(f"{model.parent.label}: its weight is 0 everywhere; leave the model out")
        self._check_filters(list(tensors))
        return wanted

    def _term(self, tensor: str, label: str, parent: int, base: int, weight: float, density: float) -> Term:
        if self.recipe.method not in DARE:
            return Term(parent, base, weight)
        limit = threshold(density)
        if limit < 1:
            raise MergeError(f"{label}: density {density:g} is below 1/{RESOLUTION}, the resolution of the masks")
        if limit == RESOLUTION:
            return Term(parent, base, weight)
        factor = RESOLUTION / limit if self.recipe.rescale == "probability" else 1.0
        return Term(parent, base, weight, limit, mask_key(self.recipe.seed, tensor, label), factor)

    def _check_filters(self, names: list[str]) -> None:
        for owner, settings in [("parameters", self.recipe.settings)] + [
            (m.parent.label, m.settings) for m in self.recipe.models
        ]:
            for key, setting in settings.items():
                for unused in unused_filters(setting, names):
                    raise MergeError(f"{owner}: {key}: no tensor's name contains {unused!r}, such as {names[1]}")

    def _merged_checkpoint(self) -> Checkpoint:
        """The merged model as a checkpoint whose bytes are not computed yet."""
        side, reference = self.side.checkpoint, self.first.checkpoint
        dtype = self.recipe.out_dtype
        tensors = {
            name: Logical(name, t.shape, BY_NAME[dtype] if dtype else t.dtype, t.regions)
            for name, t in reference.tensors.items()
        }
        return Checkpoint(
            root=side.root,
            kind="merge",
            tensors=tensors,
            shape=dataclasses.replace(reference.shape, padded_vocab_size=reference.shape.vocab_size),
            config=side.config,
            config_text=side.config_text,
            side_folder=side.side_folder,
            divisible_by=reference.divisible_by,
            given=side.given,
        )

    # --- output

    def _memory(self) -> tuple[int, int]:
        """(bytes of a band, threads) that keep memory under the limit."""
        largest_row = max(rows_and_columns(t.shape)[1] for t in self.merged.tensors.values())
        budget = self.request.max_ram - _MEMORY_BASE

        def needed(threads: int, band: int) -> int:
            return threads * MergedBands.thread_bytes(self._order, len(self.recipe.models), band, largest_row)

        for threads in range(max(1, self.request.threads), 0, -1):
            band = _LARGEST_BAND
            while band >= _SMALLEST_BAND:
                if needed(threads, band) <= budget:
                    return band, threads
                band //= 2
        least = _MEMORY_BASE + needed(1, _SMALLEST_BAND)
        raise MergeError(
            f"--max-ram {self.request.max_ram >> 20} MiB is too little for {len(self._order)} models; "
            f"give at least {-(-least >> 20)} MiB"
        )

    def _output_folder(self) -> OutputFolder:
        request, side = self.request, self.side
        if side.checkpoint.config is None and (request.tp is None or side.checkpoint.side_folder is None):
            raise MergeError(
                f"{side.label} has no config.json (GPT-NeoX does not keep one); add `hf_source: DIR` to its "
                f"entry, or name another model with `side_files`"
            )
        types = {t.dtype.name for t in self.merged.tensors.values()}
        if request.tp is not None and len(types) > 1:
            raise MergeError(
                f"{self.first.label} holds {' and '.join(sorted(types))}; give out_dtype to write for NeoX"
            )
        conversion = ConversionRequest(
            output=request.output,
            threads=self.threads,
            shard=request.shard,
            resume=request.resume,
            force=request.force,
            band=self.band,
        )
        if request.tp is None:
            output = prepare_hf(self.merged, request.shard_size, conversion)
        else:
            output = prepare_neox(self.merged, request.tp, request.divisible_by, conversion)
            self._prefix = f"{output.manifest_in}/{SIDE}/"
        output.extras |= {self._prefix + n: p for n, p in license_files(self._order, self.side).items()}
        output.extras[self._prefix + RECIPE] = recipe_text(self.recipe).encode()
        output.provenance |= self._provenance()
        output.provenance.pop("source_kind", None)
        output.plan.whole = self._identity(output.plan.whole)
        return output

    def _provenance(self) -> dict[str, Any]:
        merge = {"recipe": recipe_text(self.recipe), "masks": SCHEME if self.recipe.method in DARE else None}
        return {"written_by": WRITTEN_BY, "source": sorted(self.parents), "merge": merge}

    def _identity(self, targets: str) -> str:
        """Identifies the merge, including the parents' files as they are on disk now, for --resume and --shard."""
        stamps = []
        for parent in self._order:
            for path in parent.weight_files():
                status = path.stat()
                stamps.append([parent.label, str(path), status.st_size, status.st_mtime_ns])
        body = json.dumps([targets, recipe_text(self.recipe), stamps, SCHEME, self.request.tile])
        return hashlib.sha256(body.encode()).hexdigest()

    @property
    def bytes_read(self) -> int:
        """Bytes of this share's tensors in all parents, times the number of passes over them."""
        total = 0
        for name in self.output.plan.sources:
            total += (1 + self.wanted[name].passes) * sum(p.checkpoint.tensors[name].nbytes for p in self._order)
        return total

    def work(self, names: list[str] | None = None) -> int:
        """Units of progress: bytes of the output, and elements measured beforehand."""
        sizes = {job.tensor.name for job in self.output.plan.jobs} if names is None else set(names)
        measured = sum(self.wanted[n].passes * _elements(self.merged.tensors[n]) for n in sizes)
        return measured + sum(job.nbytes for job in self.output.plan.jobs)

    def bands(self, names: list[str], progress: Callable[[int], None]) -> MergedBands:
        """The merged bands of the tensors `names`; measures them first if their method needs it."""
        check_replicas(self.parents)
        plans = measure({n: self.wanted[n] for n in names}, self._order, self.threads, progress)
        labels = [model.parent.label for model in self.recipe.models]
        return MergedBands(self._order, plans, labels, self._last_files, self.request.tile)

    def check_output(self) -> None:
        """Reject an impossible output, or one that would replace a parent, before anything is read or written."""
        output = self.request.output.resolve()
        for parent in self._order:
            adapter = [parent.adapter.root] if parent.adapter else []
            for folder in (parent.entry.path, parent.checkpoint.root, *adapter):
                place = folder.resolve()
                if output == place or output in place.parents or place in output.parents:
                    raise MergeError(
                        f"--output {self.request.output} is, holds or lies in {folder}, which is {parent.label}; "
                        f"choose another folder"
                    )
        self.output.check()

    def run(self, progress: Callable[[int], None]) -> bool:
        """Write the output; False if other shares are not finished. Sets `report` if this call completed it."""
        self.check_output()
        self.output.source = self.bands(sorted(self.output.plan.sources), progress)
        return self.output.write(progress)

    def _last_files(self, report: MergeReport, hashes: dict[str, str]) -> Mapping[str, bytes | Path]:
        self.report = report
        types = sorted({t.dtype.name for t in self.merged.tensors.values()})
        facts = facts_of(self.recipe, self.side, types, self.request.command)
        card = model_card(self.recipe, self.parents, report, hashes, facts)
        return {
            self._prefix + CARD: card.encode(),
            self._prefix + REPORT: report_json(self.recipe, report, hashes),
        }


def _elements(tensor: Logical) -> int:
    return tensor.nbytes // tensor.dtype.itemsize


def _has_chat_template(parent: Parent) -> bool:
    folder = parent.checkpoint.side_folder
    if folder is None:
        return False
    config = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (config.is_file() and '"chat_template"' in config.read_text())
