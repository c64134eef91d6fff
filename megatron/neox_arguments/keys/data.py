"""Keys of the data: tokenizer, indexed datasets, blends, packing, and what the loss sees."""

from __future__ import annotations

from typing import Literal

from megatron.neox_arguments.keys.fields import Keys, derived, key, required


class Replay(Keys):
    """General text that accompanies the other sources in every epoch of theirs."""

    share: float = required("Share of the training samples, between 0 and 1.", gt=0, lt=1, ours=True)
    fresh_each_epoch: bool = key(
        True, "Go on from epoch to epoch, repeating nothing before all is read; false replays the same.", ours=True
    )


class DataSource(Keys):
    """An entry of train_data_paths that says more than a path."""

    path: str = required("Prefix of the .bin/.idx pair.", ours=True)
    replay: Replay | None = key(None, "The source is replayed general text.", ours=True)


class DataKeys(Keys):
    seq_length: int = derived(
        "max_position_embeddings when only the shape matters; training and evaluation need it",
        "Tokens per sample.",
        gt=0,
    )
    tokenizer_type: Literal["HFTokenizer", "TiktokenTokenizer", "SPMTokenizer"] = key(
        "HFTokenizer",
        "HFTokenizer reads tokenizer.json, TiktokenTokenizer Meta's tokenizer.model of Llama-3, SPMTokenizer a "
        "SentencePiece model.",
    )
    vocab_file: str | None = key(None, "Path of the tokenizer file.")
    merge_file: str | None = key(None, "Accepted from GPT-NeoX configurations; no supported tokenizer has one.")
    data_path: str | None = key(None, "Prefix of one .bin/.idx pair, divided by `split`.")
    split: str = key("969, 30, 1", "Shares of train, valid and test documents in data_path.")
    train_data_paths: list[str | DataSource] | None = key(
        None,
        "Prefixes of the training sources; an entry may be {path: ..., replay: {share: 0.2}}.",
        min_length=1,
    )
    valid_data_paths: list[str] | None = key(
        None, "Prefixes of the validation sources; each is reported apart.", min_length=1
    )
    test_data_paths: list[str] | None = key(None, "Prefixes of the test sources.", min_length=1)
    train_data_weights: list[float] | None = key(
        None, "Weights of the training sources without replay. When absent: equal, or by size beside replay."
    )
    valid_data_weights: list[float] | None = key(None, "Weights of the validation sources.")
    test_data_weights: list[float] | None = key(None, "Weights of the test sources.")
    train_label_data_paths: list[str] | None = key(None, "Label prefixes beside train_data_paths; -100 is not learned.")
    valid_label_data_paths: list[str] | None = key(None, "Label prefixes beside valid_data_paths.")
    test_label_data_paths: list[str] | None = key(None, "Label prefixes beside test_data_paths.")
    data_impl: Literal["mmap", "infer"] = key("mmap", "Dataset format: .bin/.idx. infer means mmap.")
    pack_impl: Literal["packed", "pack_until_overflow", "unpacked", "best_fit"] = key(
        "packed",
        "How documents fill samples. packed: one after the other, cut at seq_length; pack_until_overflow: whole "
        "documents in random order; unpacked: one each; best_fit: whole documents where they leave the least room.",
    )
    allow_chopped: bool = key(
        True, "Where documents are kept whole: cut those longer than a sample into several; false leaves them out."
    )
    eod_mask_loss: bool = key(False, "Do not learn what follows an end-of-document token.")
    isolate_documents: bool = key(
        False, "Tokens attend only inside their own document; positions restart at each.", ours=True
    )
    seed: int = key(1234, "Seed of initialisation and sample order.", gt=0)
