"""Packed conversations with masks, from JSON to gradients: every learned token has the same weight however the samples
are split, and only the assistant's words are learned."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from examples.demo_tokenizer import train_tokenizer
from megatron.common.labels import IGNORE_INDEX
from megatron.data.build import build_datasets
from megatron.tokenizer import build_tokenizer
from tests.support.configurations import data_args
from tests.support.conversations import conversations
from tests.support.engine_runs import relative_difference
from tests.support.gradients import SPLITS, assert_equal_gradients, whole_gradients
from tests.support.models import LLAMA3_ROPE, Case
from tests.support.text_files import write_records
from tests.support.vocabulary import real_texts
from tools.datasets.preprocess_sft import main as preprocess_sft

pytestmark = pytest.mark.distributed

VOCAB, SAMPLES = 640, 32
CASE = Case(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=40, vocab=VOCAB, rope=LLAMA3_ROPE, seq=96)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The keys that preprocess_sft.py writes for its two sources, with the tokenizer."""
    folder = tmp_path_factory.mktemp("sft")
    records = conversations(90, "stars"), conversations(60, "gardens")
    texts = [message["content"] for part in records for record in part for message in record["messages"]]
    train_tokenizer([*texts, *real_texts()[:10]], VOCAB).save(str(folder / "tokenizer.json"))
    sources = [write_records(folder / f"{name}.jsonl", part) for name, part in zip("ab", records, strict=True)]
    arguments = ["--output-prefix", str(folder / "sft"), "--tokenizer-type", "HFTokenizer", "--workers", "1"]
    arguments += ["--vocab-file", str(folder), "--source", f"a:0.7={sources[0]}", "--source", f"b:0.3={sources[1]}"]
    assert preprocess_sft(arguments) == 0
    return {**yaml.safe_load((folder / "sft_train.yml").read_text()), "vocab_file": str(folder / "tokenizer.json")}


@pytest.fixture(scope="module")
def samples(keys: dict[str, Any]) -> list[Any]:
    """One global batch of packed samples, as a run reads them."""
    args = data_args(**keys, vocab_size=VOCAB, seq_length=CASE.seq, train_iters=1, train_batch_size=SAMPLES)
    train = build_datasets(args).train
    return [train[place] for place in range(SAMPLES)]


def test_the_batch_is_packed_isolated_and_unevenly_masked(keys: dict[str, Any], samples: list[Any]) -> None:
    assert keys["pack_impl"] == "best_fit"
    assert keys["isolate_documents"] is True
    documents = [int(sample["positions"].eq(0).sum()) for sample in samples]
    learned = [int(sample["labels"].ne(IGNORE_INDEX).sum()) for sample in samples]
    assert max(documents) > 1
    assert min(learned) > 0
    assert max(learned) > 1.2 * min(learned)


def test_only_assistant_text_is_learned(keys: dict[str, Any], samples: list[Any]) -> None:
    tokenizer = build_tokenizer("HFTokenizer", keys["vocab_file"])
    said = {f"{m['content']}<|eot_id|>" for tag in ("stars", "gardens") for record in conversations(90, tag)
            for m in record["messages"] if m["role"] == "assistant"}  # fmt: skip
    for sample in samples:
        labels = sample["labels"]
        text = tokenizer.decode(labels[labels != IGNORE_INDEX].tolist())
        for turn in text.split("<|eot_id|>")[:-1]:
            assert f"{turn}<|eot_id|>" in said, turn


def gradients(split: str, samples: list[Any]) -> list[Tensor]:
    """Gradients of all samples, without a position's `sample_id`."""
    read = [{key: sample[key] for key in ("tokens", "labels", "positions")} for sample in samples]
    return whole_gradients(CASE, *SPLITS[split], read, isolate_documents=True)


@pytest.fixture(scope="module")
def whole_batch(samples: list[Any]) -> list[Tensor]:
    return gradients("1x32", samples)


@pytest.mark.parametrize("split", ["4x8", "dp2x4x4"])
def test_splits_give_equal_gradients(split: str, samples: list[Any], whole_batch: list[Tensor]) -> None:
    assert_equal_gradients(gradients(split, samples), whole_batch)


def test_learning_user_words_as_well_would_be_seen(samples: list[Any], whole_batch: list[Tensor]) -> None:
    """The masks affect these gradients: without the masks they differ."""
    unmasked = []
    for sample in samples:
        labels = torch.cat([sample["tokens"][1:], torch.tensor([IGNORE_INDEX])])
        unmasked.append({**sample, "labels": labels})
    assert relative_difference(gradients("1x32", unmasked)[0], whole_batch[0]) > 0.05


def test_the_gradients_are_those_of_transformers_on_single_conversations(
    samples: list[Any], whole_batch: list[Tensor]
) -> None:
    """The norm of all gradients, from `LlamaForCausalLM` run on each conversation alone."""
    model = CASE.hugging_face().train()
    total = sum(int(sample["labels"].ne(IGNORE_INDEX).sum()) for sample in samples)
    for sample in samples:
        starts = [*sample["positions"].eq(0).nonzero().flatten().tolist(), CASE.seq]
        for first, behind in itertools.pairwise(starts):
            labels = sample["labels"][first:behind]
            if bool(labels.ne(IGNORE_INDEX).any()):
                logits = model(sample["tokens"][None, first:behind]).logits[0]
                loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
                (loss / total).backward()
    theirs = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    ours = torch.cat(whole_batch).norm()
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
