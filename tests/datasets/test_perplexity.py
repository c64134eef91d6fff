"""Perplexity: a KenLM n-gram computed by hand, a Hugging Face model against transformers, and the filter using them."""

import json
import math
import random
from pathlib import Path

import pytest
import torch

from megatron.data.indexed import DataError
from tests.support.data_commands import ANY_SHARE, cleaned
from tests.support.text_files import write_texts
from tests.support.vocabulary import VOCAB_SIZE, real_texts
from tools.datasets.cleaning.perplexity import load_perplexity
from tools.datasets.train_ngram import main as train_ngram

pytestmark = pytest.mark.unit

ARPA = r"""\data\
ngram 1=5
ngram 2=2

\1-grams:
-3	<unk>
-99	<s>	-0.5
-1	</s>
-1.5	red	-0.25
-2	star

\2-grams:
-0.2	<s>	red
-0.3	red	star

\end\
"""


def test_an_ngram_by_hand(tmp_path: Path) -> None:
    (tmp_path / "m.arpa").write_text(ARPA)
    perplexity = load_perplexity(tmp_path / "m.arpa")
    known = 0.2 + 0.3 + 1  # <s> red, red star, </s> (star has no weight for backing off)
    assert perplexity("Red   STAR") == pytest.approx(10 ** (known / 3))
    unknown = (0.5 + 3) + 1  # <s> backs off to <unk>, then </s>
    assert perplexity("red star\n\n quasar\n") == pytest.approx(10 ** ((known + unknown) / 5))


def test_a_trained_ngram_knows_language_from_letter_soup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = real_texts()
    source = write_texts(tmp_path / "trusted.jsonl", texts[:60])
    assert train_ngram(["--input", str(source), "--output", str(tmp_path / "m.arpa")]) == 0
    perplexity = load_perplexity(tmp_path / "m.arpa")
    assert not list(tmp_path.glob(".partial*"))
    chance = random.Random(0)
    held = [text for text in texts[60:] if len(text) > 400]
    soup = ["".join(chance.sample(text, len(text))) for text in held]
    hardest, easiest = max(map(perplexity, held)), min(map(perplexity, soup))
    assert hardest < easiest / 3
    limit = math.sqrt(hardest * easiest)
    kept, dropped = cleaned(
        tmp_path,
        *held,
        *soup,
        perplexity_model=tmp_path / "m.arpa",
        max_perplexity=limit,
        near_duplicate=0,
        **ANY_SHARE,
    )
    assert len(kept) == len(held)
    assert {entry["rule"] for entry in dropped} == {"max_perplexity"}
    assert [entry["line"] for entry in dropped] == list(range(len(held) + 1, 2 * len(held) + 1))
    percentiles = json.loads((tmp_path / "out_report/summary.json").read_text())["perplexity_percentiles"]
    assert percentiles["100"] > limit > percentiles["25"]
    _, dropped = cleaned(
        tmp_path,
        *held,
        *soup,
        perplexity_model=tmp_path / "m.arpa",
        min_perplexity=limit,
        near_duplicate=0,
        **ANY_SHARE,
    )
    assert [entry["line"] for entry in dropped] == list(range(1, len(held) + 1))
    assert train_ngram(["--input", str(source), "--output", str(tmp_path / "m.txt")]) == 2
    assert train_ngram(["--input", str(source), "--output", str(tmp_path / "m.arpa"), "--order", "9"]) == 2
    assert train_ngram(["--input", str(tmp_path / "no.jsonl"), "--output", str(tmp_path / "m.arpa")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_hugging_face_model(vocab_folder: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=48,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "hf")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(vocab_folder / "tokenizer.json"), bos_token="<|begin_of_text|>"
    )
    tokenizer.save_pretrained(tmp_path / "hf")
    text = real_texts()[0][:400]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    total = 0.0
    for piece in ids.split(47):  # windows of 48 including their begin-of-text token
        piece = torch.cat([torch.tensor([tokenizer.bos_token_id]), piece])
        with torch.no_grad():
            total += model(input_ids=piece[None], labels=piece[None]).loss.item() * (len(piece) - 1)
    perplexity = load_perplexity(tmp_path / "hf")
    assert len(ids) > 100
    assert perplexity(text) == pytest.approx(math.exp(total / len(text.encode())), rel=1e-4)
    _, dropped = cleaned(tmp_path, *real_texts()[:4], perplexity_model=tmp_path / "hf", max_perplexity=1e9, workers=2)
    assert not dropped


def test_invalid_perplexity_models_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("global_step1")
    with pytest.raises(DataError, match="NeoX checkpoint; convert it first: python tools/convert_hf to-hf"):
        load_perplexity(tmp_path)
    (tmp_path / "m.arpa").write_text("not one")
    with pytest.raises(DataError, match="not a KenLM model"):
        load_perplexity(tmp_path / "m.arpa")
    with pytest.raises(DataError, match="expected a KenLM file"):
        load_perplexity(tmp_path / "absent")
