"""The demo's text and tokenizer; its independent check reads the same samples as validation."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from examples import demo_data
from examples.demo_tokenizer import train_tokenizer
from megatron.common.labels import IGNORE_INDEX
from megatron.data.sample import SampleForm
from megatron.data.sources import OncePacked
from megatron.tokenizer import build_tokenizer
from megatron.tokenizer.llama3 import SPECIAL_TOKENS
from tests.support.data_commands import preprocess

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["demo_data.py", "--output", str(folder)])
        assert demo_data.main() == 0
    return folder


def test_text_is_whole_split_by_document_and_large_enough(demo: Path) -> None:
    texts = {p.stem: [json.loads(line)["text"] for line in p.open()] for p in sorted((demo / "text").iterdir())}
    assert sorted(texts) == ["domain_train", "domain_valid", "general_train", "general_valid"]
    for name in ("domain", "general"):
        assert not set(texts[f"{name}_train"]) & set(texts[f"{name}_valid"])
        assert len(texts[f"{name}_valid"]) >= 5
    assert sum(map(len, texts["domain_train"])) > 1_500_000
    assert set(texts["domain_train"]) <= set(demo_data.documents(demo_data.docstrings("astropy")))


def test_the_tokenizer_is_a_small_llama_3(demo: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = build_tokenizer("HFTokenizer", demo / "tokenizer")
    vocab_size = yaml.safe_load((demo_data.ROOT / "configs/tiny/model.yml").read_text())["vocab_size"]
    assert tokenizer.vocab_size == vocab_size
    assert [tokenizer.token_id(name) for name in SPECIAL_TOKENS] == list(range(vocab_size - 256, vocab_size))
    theirs = AutoTokenizer.from_pretrained(demo / "tokenizer")
    text = "The redshift z = 0.5 of NGC 1234's halo.\n"
    assert theirs(text).input_ids == [tokenizer.bos, *tokenizer.encode(text)]
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert theirs.apply_chat_template(chat, tokenize=False) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHo<|eot_id|>"
    )


def test_training_a_tokenizer_is_repeatable_and_wants_enough_text(demo: Path) -> None:
    texts = [json.loads(line)["text"] for line in (demo / "text/general_train.jsonl").open()]
    assert train_tokenizer(texts, 700).to_str() == train_tokenizer(texts, 700).to_str()
    with pytest.raises(ValueError, match="add text"):
        train_tokenizer(["short"], 4096)


def test_the_outside_check_reads_what_validation_reads(demo: Path, tmp_path: Path) -> None:
    from examples.demo_check import samples  # transformers and megatron-core

    source = demo / "text/general_valid.jsonl"
    assert preprocess(demo / "tokenizer", tmp_path / "v", source, prepend_bos=True, append_eod=True) == 0
    prefix = str(tmp_path / "v_text_document")
    ours = OncePacked(prefix, SampleForm(256), seed=1)
    theirs = samples(Path(prefix), 256)
    assert len(ours) == len(theirs)

    def key(tokens: torch.Tensor, labels: torch.Tensor) -> tuple[int, ...]:
        learned = labels != IGNORE_INDEX
        return (*tokens[learned].tolist(), *labels[learned].tolist())

    assert sorted(key(s["tokens"], s["labels"]) for s in (ours[i] for i in range(len(ours)))) == sorted(
        key(piece[:-1], piece[1:]) for piece in theirs
    )
