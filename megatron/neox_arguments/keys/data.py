"""Keys of the data and their rules: tokenizer, indexed datasets, blends, packing, and what the loss sees."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron.common.errors import ConfigError
from megatron.neox_arguments.keys.fields import Keys, derived, key, required
from megatron.neox_arguments.registry import ALL_TASKS, Derived, Registry

if TYPE_CHECKING:
    from megatron.neox_arguments.keys.all_keys import AllKeys

registry = Registry()


class Replay(Keys):
    """General text mixed into every epoch of the other sources."""

    share: float = required(
        "Fraction of the training samples that come from this source, between 0 and 1.", gt=0, lt=1, ours=True
    )
    fresh_each_epoch: bool = key(
        True,
        "Read different samples in each epoch of the other sources, none of them twice before all have been read; "
        "false: replay the same samples in every epoch.",
        ours=True,
    )


class DataSource(Keys):
    """An entry of train_data_paths with more than a path."""

    path: str = required("Prefix of the .bin/.idx pair.", ours=True)
    replay: Replay | None = key(
        None, "Treat the source as replay: general text mixed in at a fixed share of the samples.", ours=True
    )


class DataKeys(Keys):
    seq_length: int = derived(
        "required for train.py and eval.py, else max_position_embeddings",
        "Tokens per sample; for images, patches that the model reads.",
        gt=0,
    )
    tokenizer_type: Literal[
        "HFTokenizer", "TiktokenTokenizer", "SPMTokenizer", "GPT2BPETokenizer", "HFGPT2Tokenizer"
    ] = derived(
        "GPT2BPETokenizer with merge_file, else HFTokenizer",
        "Format of the tokenizer. HFTokenizer: tokenizer.json; TiktokenTokenizer: Meta's tokenizer.model of Llama-3; "
        "SPMTokenizer: a SentencePiece model; GPT2BPETokenizer and HFGPT2Tokenizer: GPT-2's vocab.json and merges.txt.",
    )
    vocab_file: str | None = key(None, "Path of the tokenizer file.")
    merge_file: str | None = key(
        None, "Path of merges.txt for GPT2BPETokenizer and HFGPT2Tokenizer; by default in the folder of vocab_file."
    )
    data_path: str | None = key(
        None, "Prefix of a single .bin/.idx pair, divided into training, validation and test data by `split`."
    )
    split: str = key("969, 30, 1", "Proportions of training, validation and test documents in data_path.")
    train_data_paths: list[str | DataSource] | None = key(
        None,
        "Prefixes of the .bin/.idx pairs to train on; an entry may be {path: ..., replay: {share: 0.2}}.",
        min_length=1,
    )
    valid_data_paths: list[str] | None = key(
        None, "Prefixes of the .bin/.idx pairs to validate on; each is reported separately.", min_length=1
    )
    test_data_paths: list[str] | None = key(
        None,
        "Prefixes of the .bin/.idx pairs to evaluate once, by the trained model; each is reported separately.",
        min_length=1,
    )
    train_data_weights: list[float] | None = key(
        None, "Relative weights of the training sources without replay. Default: equal, or by size if there is replay."
    )
    weight_by_num_documents: bool = key(
        False,
        "Weight training sources by documents, as GPT-NeoX does: a source with share p of all documents weighs "
        "p^alpha (1 - p), where alpha is weighted_sampler_alpha; train_data_weights is ignored.",
    )
    weighted_sampler_alpha: float = key(
        1.0, "Exponent alpha of weight_by_num_documents; below 1, small sources count more.", ge=0
    )
    data_order: Literal["own", "gpt-neox"] = key(
        "own",
        "Order of documents and samples. own: this project's; gpt-neox: GPT-NeoX's for the same seed, files and length "
        "of run, to continue a run started with GPT-NeoX.",
        ours=True,
    )
    valid_data_weights: list[float] | None = key(
        None, "Weights of the validation sources in their mean loss; by default equal."
    )
    test_data_weights: list[float] | None = key(
        None, "Weights of the test sources in their mean loss; by default equal."
    )
    train_label_data_paths: list[str] | None = key(
        None, "Prefixes of label files, one per entry of train_data_paths; the loss ignores tokens labeled -100."
    )
    valid_label_data_paths: list[str] | None = key(None, "Prefixes of label files, one per entry of valid_data_paths.")
    test_label_data_paths: list[str] | None = key(None, "Prefixes of label files, one per entry of test_data_paths.")
    data_impl: Literal["mmap", "infer"] = key("mmap", "Dataset format: always .bin/.idx pairs; infer means mmap.")
    pack_impl: Literal["packed", "pack_until_overflow", "unpacked", "best_fit"] = key(
        "packed",
        "How documents fill samples. packed: concatenated and cut at seq_length; pack_until_overflow: whole documents "
        "in random order, as many as fit; unpacked: one document per sample; best_fit: whole documents, combined to "
        "leave the least space.",
    )
    allow_chopped: bool | None = key(
        None,
        "Allow documents to be cut. Where pack_impl keeps them whole, true cuts those longer than a sample into "
        "several; by default they are left out and counted. With pack_impl: packed, true confirms that conversations "
        "may be cut where a sample ends.",
    )
    eod_mask_loss: bool = key(False, "Exclude the prediction after an end-of-document token from the loss.")
    isolate_documents: bool = key(
        False, "Let tokens attend only within their own document; positions restart at each document.", ours=True
    )
    seed: int = key(1234, "Seed of weight initialization, sample order and text generation.", gt=0)


# --- derivations


@registry.derivation(*ALL_TASKS, fills=("tokenizer_type",))
def tokenizer_of_the_files(args: AllKeys, world_size: int | None) -> Derived:
    """GPT-NeoX's default is GPT2BPETokenizer, which needs merge_file."""
    if args.tokenizer_type is not None or args.modality == "patches":
        return Derived({})
    if args.merge_file is None:
        return Derived({"tokenizer_type": "HFTokenizer"})
    note = "tokenizer_type is not given: GPT2BPETokenizer, GPT-NeoX's default, is used because merge_file is given"
    return Derived({"tokenizer_type": "GPT2BPETokenizer"}, (note,))


@registry.derivation(*ALL_TASKS, fills=("vocab_size",))
def vocabulary_of_the_tokenizer(args: AllKeys, world_size: int | None) -> Derived:
    """`vocab_size` from the tokenizer, if its file is on this machine."""
    if args.vocab_size is not None or args.vocab_file is None:
        return Derived({})
    path = Path(args.vocab_file)
    if not path.exists():
        return Derived({}, (unknown_vocabulary(args),))
    from megatron.tokenizer import TokenizerError, vocabulary_size  # imports numpy, which most checks do not need

    try:
        size = vocabulary_size(args.tokenizer_type, path, args.merge_file)
    except TokenizerError as error:
        raise ConfigError(str(error)) from None
    return Derived({"vocab_size": size}, (f"vocab_size {size}: taken from the tokenizer in {path}",))


def unknown_vocabulary(args: AllKeys) -> str:
    """The message for a configuration whose vocabulary size cannot be determined here."""
    return (
        f"vocab_size is taken from the tokenizer, but vocab_file {args.vocab_file} is not on this machine; give the "
        f"path of the file, or vocab_size itself"
    )


@registry.derivation("generate", "mcq", "embed", "model", fills=("seq_length",))
def samples_as_long_as_positions(args: AllKeys, world_size: int | None) -> Derived:
    return Derived({"seq_length": args.max_position_embeddings} if args.seq_length is None else {})


# --- rules


@registry.rule(*ALL_TASKS)
def one_source_of_data(args: DataKeys) -> str | None:
    lists = [name for name in ("train_data_paths", "valid_data_paths", "test_data_paths") if getattr(args, name)]
    if args.data_path and lists:
        return (
            f"data_path and {', '.join(lists)} are mutually exclusive: split already divides data_path into training, "
            f"validation and test data; keep one way"
        )
    return None


@registry.rule("train")
def training_has_data(args: DataKeys) -> str | None:
    if args.data_path or args.train_data_paths:
        return None
    return "no training data: give train_data_paths (or data_path with split)"


@registry.rule(*ALL_TASKS)
def weights_match_paths(args: DataKeys) -> str | None:
    for part in ("train", "valid", "test"):
        paths, weights = getattr(args, f"{part}_data_paths"), getattr(args, f"{part}_data_weights")
        if weights is None:
            continue
        weighted = [path for path in paths or [] if isinstance(path, str) or path.replay is None]
        if len(weights) != len(weighted):
            return (
                f"{part}_data_weights has {len(weights)} entries for {len(weighted)} {part}_data_paths without replay"
            )
        if not all(map(isfinite, weights)) or min(weights, default=0) < 0 or sum(weights) <= 0:
            return f"{part}_data_weights {weights}: weights must be finite, not negative and not all zero"
    return None


@registry.rule(*ALL_TASKS)
def replay_leaves_something(args: DataKeys) -> str | None:
    replays = [None if isinstance(path, str) else path.replay for path in args.train_data_paths or []]
    total = sum(replay.share for replay in replays if replay is not None)
    if total < 1 and (None in replays or not replays):
        return None
    return (
        f"the replay shares of train_data_paths sum to {total:g}, sources without replay: {replays.count(None)}; "
        f"replay is mixed into other sources, so leave some share to at least one"
    )


@registry.rule(*ALL_TASKS)
def labels_match_paths(args: DataKeys) -> str | None:
    for part in ("train", "valid", "test"):
        paths, labels = getattr(args, f"{part}_data_paths"), getattr(args, f"{part}_label_data_paths")
        if labels is not None and len(labels) != len(paths or []):
            return f"{part}_label_data_paths has {len(labels)} entries for {len(paths or [])} {part}_data_paths"
    return None


@registry.rule(*ALL_TASKS)
def vocabulary_has_a_source(args: AllKeys) -> str | None:
    if args.vocab_size is not None or args.vocab_file is not None or args.modality == "patches":
        return None
    return (
        "the vocabulary size is unknown: give vocab_file with tokenizer_type, to take it from the tokenizer, or "
        "vocab_size as in the Hugging Face config"
    )


@registry.rule("train")
def order_of_gpt_neox_is_of_packed_sources(args: AllKeys) -> str | None:
    """GPT-NeoX's order depends on the length of the run, and is not defined for replay."""
    if args.data_order == "own":
        return None
    replayed = any(not isinstance(path, str) and path.replay for path in args.train_data_paths or [])
    wrong = [
        word
        for word, found in (
            (f"pack_impl: {args.pack_impl}", args.pack_impl != "packed"),
            ("train_epochs", args.train_epochs is not None),
            ("replay", replayed),
        )
        if found
    ]
    if not wrong:
        return None
    return (
        f"data_order: gpt-neox is defined for pack_impl: packed with train_iters and without replay, not for "
        f"{', '.join(wrong)}"
    )


@registry.rule("train", "eval")
def weights_are_given_once(args: DataKeys) -> str | None:
    if not args.weight_by_num_documents:
        return None
    if any(not isinstance(path, str) and path.replay for path in args.train_data_paths or []):
        return (
            "weight_by_num_documents and replay are mutually exclusive: with replay, sources are weighted by their size"
        )
    return None


@registry.rule("train", "eval")
def chopping_has_an_effect(args: DataKeys) -> str | None:
    if args.allow_chopped is not False or args.pack_impl != "packed":
        return None
    return (
        "allow_chopped: false has no effect with pack_impl: packed, which cuts every document where a sample ends; "
        "choose pack_until_overflow, unpacked or best_fit to keep documents whole"
    )


@registry.rule("train", "eval")
def document_ends_are_known(args: DataKeys) -> str | None:
    if args.vocab_file or not args.eod_mask_loss:
        return None
    return "eod_mask_loss needs the end-of-document token: give vocab_file, the tokenizer's file"


@registry.warning(*ALL_TASKS)
def merge_file_is_unused(args: DataKeys) -> str | None:
    if args.merge_file is None or args.tokenizer_type in ("GPT2BPETokenizer", "HFGPT2Tokenizer"):
        return None
    return f"merge_file has no effect: the merges of {args.tokenizer_type} are in vocab_file"
