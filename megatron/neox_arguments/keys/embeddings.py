"""Keys of embed.py and their rules: input, layers and pooling, output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from megatron.neox_arguments.keys.fields import Keys, key
from megatron.neox_arguments.registry import Registry

if TYPE_CHECKING:
    from megatron.neox_arguments.keys.all_keys import AllKeys

registry = Registry()

OUTPUT_SUFFIXES = (".npy", ".parquet")


class EmbedKeys(Keys):
    """Embedding vectors of texts or images."""

    input: str | None = key(
        None,
        "Texts to embed: a .jsonl or .parquet file with one text per record. With modality: patches, the prefix of a "
        ".bin/.idx pair of images.",
        ours=True,
    )
    output: str = key(
        "embeddings.npy",
        "Output file: .npy (with the ids in a .ids.jsonl next to it) or .parquet. A .report.json describes the "
        "vectors.",
        ours=True,
    )
    text_field: str = key("text", "Field or column that holds the text.", ours=True)
    id_field: str | None = key(
        "id", "Field or column that holds the id; a record without one gets its index, from 0.", ours=True
    )
    layers: list[int] | int | Literal["all"] = key(
        -1,
        "Layers whose output becomes vectors: a number, a list, or all, in one forward pass. Numbered like "
        "transformers' `hidden_states`: 0 is the embedding, num_layers or -1 the output of the final norm.",
        ours=True,
    )
    pooling: Literal["mean", "last"] = key(
        "mean",
        "How tokens become one vector. mean: their mean, without begin-of-text; last: the vector of the last token.",
        ours=True,
    )
    l2: bool = key(False, "Scale every vector to length 1.", ours=True)
    cut_long_texts: bool = key(
        False, "Truncate texts longer than seq_length tokens, and count them, instead of refusing them.", ours=True
    )
    on_bad_record: Literal["stop", "skip"] = key(
        "stop", "What to do with a record that has no usable text; skip names and counts it.", ours=True
    )


class EmbeddingKeys(Keys):
    embed: EmbedKeys = key(EmbedKeys(), "What embed.py reads and writes.", ours=True)


def chosen_layers(args: AllKeys) -> tuple[int, ...]:
    """The layers of `embed.layers`, in order and once each, counted from 0."""
    given = args.embed.layers
    if isinstance(given, str):
        return tuple(range(args.num_layers + 1))
    numbers = [given] if isinstance(given, int) else given
    return tuple(sorted({number % (args.num_layers + 1) for number in numbers}))


# --- rules


@registry.rule("embed")
def embedded_with_some_weights(args: AllKeys) -> str | None:
    if args.load or args.from_scratch:
        return None
    return (
        "embed.py needs load, the folder of a checkpoint; or from_scratch: true, for the untrained model that "
        "training with these keys and this seed starts from"
    )


@registry.rule("embed")
def texts_to_embed_are_given(args: EmbeddingKeys) -> str | None:
    return None if args.embed.input else "embed.input is missing: the file of texts (--embed.input FILE)"


@registry.rule("embed")
def texts_to_embed_have_a_tokenizer(args: AllKeys) -> str | None:
    if args.vocab_file or args.modality == "patches":
        return None
    return "embed.py reads texts: give vocab_file, the tokenizer's file"


@registry.rule("embed")
def images_are_read_whole(args: AllKeys) -> str | None:
    given = [name for name in ("text_field", "cut_long_texts") if name in args.embed.model_fields_set]
    if args.modality != "patches" or not given:
        return None
    return (
        f"embed.{given[0]} applies to texts, but modality is patches: images have no text and are read "
        f"whole; leave it out"
    )


@registry.rule("embed")
def vectors_have_a_format(args: EmbeddingKeys) -> str | None:
    if args.embed.output.endswith(OUTPUT_SUFFIXES):
        return None
    return f"embed.output {args.embed.output}: expected a name that ends in {' or '.join(OUTPUT_SUFFIXES)}"


@registry.rule("embed")
def embedded_layers_exist(args: AllKeys) -> str | None:
    given, last = args.embed.layers, args.num_layers
    if isinstance(given, str):
        return None
    numbers = [given] if isinstance(given, int) else given
    wrong = [number for number in numbers if not -last - 1 <= number <= last]
    if numbers and not wrong:
        return None
    return (
        f"embed.layers {wrong or given}: expected numbers from 0, the embedding, to {last}, the output of the final "
        f"norm, or negative ones counted from the end, to -{last + 1}"
    )
