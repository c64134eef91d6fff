"""The key `lora`, training low-rank adapters on a frozen base, and its rules. The terms are Hugging Face's.

The adapter in `load` defines its own settings; settings that the key repeats must agree with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from megatron.common.errors import ConfigError
from megatron.layout import PROJECTIONS, in_table_order
from megatron.layout.peft_folder import PeftError, adapter_folder, read_adapter, scale_of
from megatron.neox_arguments.keys.fields import Keys, derived, key
from megatron.neox_arguments.registry import ALL_TASKS, Derived, Registry

if TYPE_CHECKING:
    from megatron.neox_arguments.keys.all_keys import AllKeys

registry = Registry()

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_PEFT_WORDS = {"r": "rank", "lora_alpha": "alpha", "target_modules": "targets", "use_rslora": "rslora"}
QUANTIZED = (
    "a quantized base is not supported: it rounds every weight to a few values, so that none of the checks used here "
    "would apply, and a merge would give a different model from the one trained. Split a bf16 base by tensor "
    "parallelism instead: raise model_parallel_size"
)
_REFUSED = {
    "quantization": QUANTIZED,
    "load_in_4bit": QUANTIZED,
    "load_in_8bit": QUANTIZED,
    "dropout": "dropout is not supported: the recomputation used here does not replay random states; leave it out",
    "use_dora": "DoRA is not supported; plain LoRA and rslora are",
    "bias": "a Llama has no biases; leave it out",
    "modules_to_save": "whole modules are not trained together with an adapter; leave it out",
}


class Lora(Keys):
    rank: int = derived("that of the adapter in load", "Rank of the adapter: columns of B and rows of A.", gt=0)
    alpha: float = derived("that of the adapter in load", "The product B A is multiplied by alpha / rank.", gt=0)
    targets: list[Projection] = derived(
        "those of the adapter in load, else all seven", "Projections that get an adapter.", min_length=1
    )
    rslora: bool = derived("that of the adapter in load, else false", "Multiply B A by alpha / sqrt(rank) instead.")
    load: str | None = key(
        None,
        "Adapter to continue or evaluate: a peft folder, or the checkpoints of a LoRA run. Default: a new adapter, "
        "whose B is zero.",
    )

    @model_validator(mode="before")
    @classmethod
    def _known_words(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for word, ours in _PEFT_WORDS.items():
            if word in value:
                raise ValueError(f"{word} is peft's name; write {ours}")
        for word, reason in {**_REFUSED, "lora_dropout": _REFUSED["dropout"]}.items():
            if value.get(word) not in (None, False, 0, "none", []):
                raise ValueError(f"{word} {value[word]!r}: {reason}")
        kept = {name: item for name, item in value.items() if name not in {*_REFUSED, "lora_dropout"}}
        if isinstance(kept.get("alpha"), int) and not isinstance(kept["alpha"], bool):
            kept["alpha"] = float(kept["alpha"])
        return {name: item for name, item in kept.items() if item is not None}

    @property
    def scale(self) -> float:
        """The factor by which the product B A is multiplied."""
        return scale_of(self.alpha, self.rank, self.rslora)

    @property
    def projections(self) -> tuple[str, ...]:
        """The targets, each once, in the layout table's order."""
        return in_table_order([*self.targets])


class LoraKeys(Keys):
    lora: Lora | None = key(
        None,
        "Train adapters (LoRA) and keep the weights of `load` frozen. Checkpoints hold only the adapter.",
        ours=True,
    )


# --- derivations


@registry.derivation(*ALL_TASKS, fills=("lora",))
def what_the_adapter_says(args: LoraKeys, world_size: int | None) -> Derived:
    """rank, alpha, targets and rslora from the adapter in `load` if it is on this machine, else as given."""
    lora = args.lora
    if lora is None:
        return Derived({})
    given = {name: getattr(lora, name) for name in ("rank", "alpha", "targets", "rslora")}
    known: dict[str, Any] = {"targets": [*PROJECTIONS], "rslora": False}
    notes: tuple[str, ...] = ()
    folder = None if lora.load is None else adapter_folder(Path(lora.load))
    if folder is not None:
        try:
            stored = read_adapter(folder)
        except PeftError as error:
            raise ConfigError(f"lora.load: {error}") from error
        known = {"rank": stored.rank, "alpha": float(stored.alpha), "targets": [*stored.targets]}
        known["rslora"] = stored.rslora
        if given["targets"] is not None:
            given["targets"] = [*in_table_order(given["targets"])]
        for name, value in given.items():
            if value is not None and value != known[name]:
                raise ConfigError(
                    f"lora.{name} is {value}, but the adapter in lora.load ({folder}) has {known[name]}; leave "
                    f"{name} out, or train a new adapter without lora.load"
                )
        notes = (f"lora: {folder} has rank {stored.rank}, alpha {stored.alpha:g}, {', '.join(stored.targets)}",)
    missing = [name for name in ("rank", "alpha") if given[name] is None and name not in known]
    if missing:
        where = (
            "" if lora.load is None else f", which cannot be read from lora.load: {lora.load} is not on this machine"
        )
        raise ConfigError(
            f"lora needs {' and '.join(missing)}{where}; write lora: {{rank: 16, alpha: 32}}, for instance"
        )
    update = {name: known[name] if given[name] is None else given[name] for name in given}
    return Derived({"lora": lora.model_copy(update=update)}, notes)


# --- rules


@registry.rule("train")
def adapters_have_a_trained_base(args: AllKeys) -> str | None:
    if args.lora is None or not args.from_scratch:
        return None
    return "lora trains an adapter on frozen weights, but from_scratch would draw them at random; give load, the base"


@registry.rule("train")
def adapters_are_saved_elsewhere(args: AllKeys) -> str | None:
    if args.lora is None or args.load is None or args.save is None:
        return None
    if Path(args.load).resolve() != Path(args.save).resolve():
        return None
    return (
        f"save and load are the same folder, {args.load}: with lora, load is the base, and checkpoints in save hold "
        f"only the adapter; give another save folder"
    )


@registry.rule("eval", "generate", "mcq", "embed")
def evaluated_adapters_are_given(args: LoraKeys) -> str | None:
    if args.lora is None or args.lora.load is not None:
        return None
    return (
        "lora without lora.load: there is no adapter to evaluate; write lora: {load: FOLDER}, or leave lora out for "
        "the base"
    )


@registry.rule("train")
def every_stage_has_an_adapter(args: AllKeys) -> str | None:
    """DeepSpeed fails on a stage without a trainable parameter, while the other stages wait for it."""
    if args.lora is None or args.pipe_parallel_size == 1 or args.pipe_partition_method.startswith("type:"):
        return None
    return (
        f"pipe_partition_method {args.pipe_partition_method} may give a stage no decoder layer, and so nothing to "
        f"train with lora; write type:transformer|mlp"
    )


@registry.warning("train")
def base_is_only_read(args: AllKeys) -> str | None:
    if args.lora is None or not args.finetune:
        return None
    return "finetune has no effect with lora: only the base's weights are loaded, and the adapter starts at iteration 0"
