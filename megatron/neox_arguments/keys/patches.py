"""Keys of image models, and the text keys that they exclude: a run trains on images or on text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron.common.errors import ConfigError
from megatron.neox_arguments.keys.fields import Keys, derived, key, required
from megatron.neox_arguments.registry import ALL_TASKS, Derived, Registry

if TYPE_CHECKING:
    from megatron.neox_arguments.keys.all_keys import AllKeys

registry = Registry()

# Keys that are about tokens, documents or conversations.
TEXT_KEYS = (
    "vocab_size",
    "make_vocab_size_divisible_by",
    "no_weight_tying",
    "tokenizer_type",
    "vocab_file",
    "merge_file",
    "train_label_data_paths",
    "valid_label_data_paths",
    "test_label_data_paths",
    "data_order",
    "pack_impl",
    "allow_chopped",
    "eod_mask_loss",
    "isolate_documents",
    "eval_tasks",
    "eval_documents",
    "mcq",
    "text_gen_type",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "stop",
    "stop_token_ids",
    "maximum_tokens",
    "num_samples",
    "chat",
    "chat_template",
    "system_prompt",
    "thinking",
    "max_thinking_tokens",
)


class PatchKeys(Keys):
    """How an image becomes a sequence of patches, and how the model reads and predicts them."""

    size: int = required("Side length of a patch in pixels. AstroPT: 16.", ours=True, gt=0)
    channels: int = key(3, "Number of bands of the images.", ours=True, gt=0)
    order: Literal["spiral", "raster"] = key(
        "spiral", "Order of the patches: from the center outwards, or row by row from the top left.", ours=True
    )
    normalise: Literal["none", "patch"] = key(
        "none",
        "Scaling of pixel values. patch: each patch gets mean 0 and standard deviation 1, as in AstroPT, and loses its "
        "brightness; none: all images are scaled alike, by mean and std.",
        ours=True,
    )
    tokenizer: Literal["mlp", "affine"] = key(
        "mlp",
        "How a patch becomes a hidden state, and a hidden state a patch. mlp: an MLP of width 4 x hidden_size with "
        "GELU; affine: one matrix.",
        ours=True,
    )
    positions: Literal["none", "learned"] = key(
        "none", "Positions besides rotary ones. learned: add a learned vector per position to the patches.", ours=True
    )
    huber_delta: float = key(1.0, "Error above which the Huber loss is linear instead of quadratic.", ours=True, gt=0)
    mean: list[float] | None = derived(
        "that of the training data, from its header",
        "With normalise: none, the value subtracted from every pixel: one per band, or one for all.",
        ours=True,
        min_length=1,
    )
    std: list[float] | None = derived(
        "that of the training data, from its header",
        "With normalise: none, the value that pixels are then divided by: one per band, or one for all.",
        ours=True,
        min_length=1,
    )


class CompletionKeys(Keys):
    """Which images generate.py continues."""

    path: str | None = key(None, "Prefix of the .bin/.idx pair of the images.", ours=True)
    count: int = key(8, "Number of images to continue, from the first on.", ours=True, gt=0)
    given_patches: int | None = key(
        None, "Number of patches of each image that are given; the rest are generated. Default: half.", ours=True, gt=0
    )
    output: str = key("completions", "Folder for the pictures and pixel values.", ours=True)


class ModalityKeys(Keys):
    modality: Literal["text", "patches"] = key(
        "text", "What the model reads and predicts: tokens, or patches of images.", ours=True
    )
    patches: PatchKeys | None = key(None, "How images are divided into patches, with modality: patches.", ours=True)
    completion: CompletionKeys = key(CompletionKeys(), "Which images generate.py continues.", ours=True)

    @property
    def reads_images(self) -> bool:
        return self.modality == "patches" and self.patches is not None

    @property
    def loss_name(self) -> str:
        """Name of the loss in log files and curves; GPT-NeoX's for text."""
        return "huber_loss" if self.reads_images else "lm_loss"

    @property
    def learned_unit(self) -> str:
        """What a sequence consists of."""
        return "patches" if self.reads_images else "tokens"


# --- derivations


@registry.derivation(*ALL_TASKS, fills=("patches",))
def scale_of_the_images(args: AllKeys, world_size: int | None) -> Derived:
    """`mean` and `std` from the header of the first training source, if it is on this machine."""
    patches = args.patches
    if patches is None or patches.normalise == "patch" or patches.mean is not None or patches.std is not None:
        return Derived({})
    path = _header_of_training(args)
    if path is None or not path.is_file():
        return Derived({})
    try:
        images = json.loads(path.read_text(encoding="utf-8"))["images"]
        mean, std = [float(value) for value in images["mean"]], [float(value) for value in images["std"]]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{path} is not a header of images with their mean and standard deviation; make the data with "
            f"tools/datasets/preprocess_images.py"
        ) from None
    note = f"patches.mean {_shown(mean)} and patches.std {_shown(std)}: taken from the training data's header, {path}"
    return Derived({"patches": patches.model_copy(update={"mean": mean, "std": std})}, (note,))


def _header_of_training(args: AllKeys) -> Path | None:
    first: Any = args.data_path or next(iter(args.train_data_paths or ()), None)
    if first is None:
        return None
    return Path(f"{first if isinstance(first, str) else first.path}.json")


def _shown(values: list[float]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"


# --- rules


@registry.rule(*ALL_TASKS)
def patches_go_with_their_modality(args: ModalityKeys) -> str | None:
    if args.modality == "text" and args.completion != CompletionKeys():
        return "completion continues images, but modality is text; leave it out"
    if (args.modality == "patches") == (args.patches is not None):
        return None
    if args.patches is None:
        return "modality: patches needs the mapping patches, with at least the size of a patch in pixels"
    return "patches describes images, but modality is text; write modality: patches, or leave patches out"


@registry.rule(*ALL_TASKS)
def images_have_no_text(args: AllKeys) -> str | None:
    if args.modality != "patches":
        return None
    given = [name for name in TEXT_KEYS if args.merged.get(name) is not None]
    if not given:
        return None
    return f"{', '.join(given)}: not available with modality: patches, only for text; leave them out"


@registry.rule("generate")
def continued_images_are_given(args: ModalityKeys) -> str | None:
    if args.modality != "patches" or args.completion.path is not None:
        return None
    return "completion.path is missing: the prefix of the images to continue (--completion.path PREFIX)"


@registry.rule("mcq")
def questions_are_text(args: ModalityKeys) -> str | None:
    return "mcq.py asks questions in text, but modality is patches" if args.modality == "patches" else None


@registry.rule("train", "eval", "generate", "embed")
def images_have_a_scale(args: AllKeys) -> str | None:
    patches = args.patches
    if patches is None:
        return None
    if patches.normalise == "patch":
        if patches.mean is None and patches.std is None:
            return None
        return (
            "patches.mean and patches.std have no effect with normalise: patch, which scales each patch by its own "
            "mean and standard deviation; leave them out"
        )
    if patches.mean is None or patches.std is None:
        return (
            f"patches.{'mean' if patches.mean is None else 'std'} is not known: with normalise: none give mean and std "
            f"(the header of the training data has them, {_header_of_training(args) or 'PREFIX.json'}), or write "
            f"normalise: patch"
        )
    lengths = {len(patches.mean), len(patches.std)}
    if lengths <= {1, patches.channels} and min(patches.std) > 0:
        return None
    return (
        f"patches.mean {_shown(patches.mean)} and patches.std {_shown(patches.std)}: expected one number, or one for "
        f"each of {patches.channels} channels, and every std above 0"
    )
