"""Tokenizers against their contract and against Meta's own package."""

import json
import random
import shutil
from pathlib import Path

import pytest
import tokenizers
from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

from megatron.tokenizer import Tokenizer, TokenizerError, build_tokenizer
from megatron.tokenizer.hf import byte_letters, equivalent_encoding
from megatron.tokenizer.llama3 import SPECIAL_TOKENS, SPLIT_PATTERN
from tests.support.vocabulary import VOCAB_SIZE, real_texts

pytestmark = pytest.mark.unit

FORMATS = [
    ("HFTokenizer", "tokenizer.json"),
    ("TiktokenTokenizer", "tokenizer.model"),
    ("SPMTokenizer", "spm.model"),
]


def adversarial_texts() -> list[str]:
    rng = random.Random(7)
    return [
        "",
        " ",
        "\n\n\n \n\t\r\n  x",
        "it's WE'LL they'Ve I'M n't",
        "0123456789 3.14159 1e-5 1,000,000 ١٢٣ ⅷ²",
        "naïve façade Ångström M⊙ ☉ z≈0.5 ± 10⁻⁵ erg s⁻¹",
        "天文学とブラックホール 黑洞 천문학 Чёрная дыра ثقب أسود",
        "👩‍🚀🚀🏳️‍🌈 e\u0301 \u200b\u200d\ufeff\u00a0\u2028 \x00\x01\x7f",
        "\ud800 lone surrogate \udfff",
        "def f(x):\n    return {'a': [x ** 2 for _ in range(10)]}  # ok\n\t\tpass\n",
        r"\begin{equation} E = mc^2 \end{equation} \alpha_{ij}",
        " ".join(SPECIAL_TOKENS[:12]),
        "<|end_of_text|><|begin_of_text|>",
        "<|eot_id|> <|eot_id|>\n\n<|start_header_id|>assistant<|end_header_id|>\n\n",
        "x" * 3000 + " " * 3000 + "\n" * 500,
        "".join(chr(c) for c in rng.choices([*range(32, 0xD800), *range(0xE000, 0x2FFFF)], k=5000)),
        "".join(rng.choices(" \n\t\r ab1.,'", k=20000)),
        b"broken \xff\xfe utf-8 \xc3".decode("utf-8", "replace"),
    ]


@pytest.fixture(params=FORMATS, ids=[name for name, _ in FORMATS])
def tokenizer(request: pytest.FixtureRequest, vocab_folder: Path) -> Tokenizer:
    kind, file = request.param
    return build_tokenizer(kind, vocab_folder / file)


def test_round_trip(tokenizer: Tokenizer) -> None:
    for text in [*adversarial_texts(), *real_texts()[:20]]:
        readable = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert tokenizer.decode(tokenizer.encode(text)) == readable


def test_text_never_becomes_a_special_token_and_nothing_is_added(tokenizer: Tokenizer) -> None:
    special = set(tokenizer.special_tokens.values())
    for text in [*adversarial_texts(), "".join(tokenizer.special_tokens), "<s>a</s>", "<|endoftext|>"]:
        assert not special & set(tokenizer.encode(text))
    assert tokenizer.encode("") == []
    assert tokenizer.encode_batch(["a b", "", "</s>"]) == [tokenizer.encode(t) for t in ("a b", "", "</s>")]


def test_ids_are_found_by_name(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.eod]) in ("<|end_of_text|>", "</s>")
    assert tokenizer.bos is not None
    assert tokenizer.decode([tokenizer.bos]) in ("<|begin_of_text|>", "<s>")
    assert max(tokenizer.bos, tokenizer.eod, tokenizer.pad) < tokenizer.vocab_size
    with pytest.raises(TokenizerError, match="no special token <nope>"):
        tokenizer.token_id("<nope>")


def test_llama_3_ids(vocab_folder: Path) -> None:
    for kind in ("HFTokenizer", "TiktokenTokenizer"):
        tokenizer = build_tokenizer(kind, vocab_folder)  # a model folder works like the file
        base = VOCAB_SIZE - 256
        assert (tokenizer.bos, tokenizer.eod, tokenizer.pad, tokenizer.vocab_size) == (
            base,
            base + 1,
            base + 4,
            VOCAB_SIZE,
        )
        assert tokenizer.token_id("<|eot_id|>") == base + 9


def test_tiktoken_equals_meta_on_metas_vocabulary() -> None:
    meta = MetaTokenizer.get_instance()
    file = Path(__import__(MetaTokenizer.__module__, fromlist=["x"]).__file__).parent / "tokenizer.model"
    ours = build_tokenizer("TiktokenTokenizer", file)
    assert ours.special_tokens == meta.special_tokens
    assert (ours.bos, ours.eod, ours.pad, ours.vocab_size) == (128000, 128001, 128004, 128256)
    for text in [*adversarial_texts(), *real_texts()]:
        assert ours.encode(text) == meta.encode(text, bos=False, eos=False)


def test_long_lines_equal_meta(vocab_folder: Path) -> None:
    meta = MetaTokenizer(vocab_folder / "tokenizer.model")
    ours = build_tokenizer("TiktokenTokenizer", vocab_folder / "tokenizer.model")
    words = "the quick brown fox ".replace(" ", "_")
    for text in (
        "spectral line " * 72_000,  # a line of a megabyte
        words * 10_000,  # runs that must be cut
        " " * 60_000 + "a" + "\n" * 25_000 + "b" * 25_001,
        "a" * 25_000 + " " + "é" * 50_001,
    ):
        assert ours.encode(text) == meta.encode(text, bos=False, eos=False)


@pytest.fixture(scope="module")
def converted(vocab_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json made from the tokenizer.model by `transformers`, in the form of Llama 3's own file."""
    import transformers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    file = TikTokenConverter(vocab_file=str(vocab_folder / "tokenizer.model"), pattern=SPLIT_PATTERN).converted()
    file.add_special_tokens([transformers.AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    file.model.ignore_merges = True
    path = tmp_path_factory.mktemp("converted") / "tokenizer.json"
    file.save(str(path))
    return path


def periodic_texts() -> list[str]:
    """Texts in which two merges could overlap and make the same token, so that their order matters."""
    rng = random.Random(3)
    alphabets = ["ab", " ", "-=", "aA", "01", "\n ", "* ", "xyx", "天文", "the "]
    texts = []
    for _ in range(3000):
        alphabet = rng.choice(alphabets)
        period = "".join(rng.choices(alphabet, k=rng.randint(1, 6)))
        texts.append((period * 200)[: rng.randint(1, 200)] + rng.choice(["", "x", " "]))
    return texts


def test_hf_equals_tiktoken_on_one_vocabulary(converted: Path, vocab_folder: Path) -> None:
    hf, tiktoken = build_tokenizer("HFTokenizer", converted), build_tokenizer("TiktokenTokenizer", vocab_folder)
    library = tokenizers.Tokenizer.from_file(str(converted))
    library.encode_special_tokens = True
    texts = [t for t in adversarial_texts() if t.isprintable() or "surrogate" not in t]
    texts += [*real_texts(), *periodic_texts(), "word" * 20_000, " " * 30_000, "a b\n" * 20_000]
    texts += [f"a{chr(c)}b {chr(c)}{chr(c)}1 {chr(c)}\n" for c in range(0x20, 0x2FFFF, 53) if not 0xD800 <= c < 0xE000]
    theirs = [e.ids for e in library.encode_batch(texts, add_special_tokens=False)]
    assert equivalent_encoding(json.loads(library.to_str())) is not None, "nothing would be compared"
    assert hf.encode_batch(texts) == theirs
    assert [ids.tolist() for ids in hf.encode_arrays(texts)] == theirs
    assert [hf.encode(text) for text in texts[:100]] == theirs[:100]
    short = [i for i, text in enumerate(texts) if len(text) <= 25_000]
    assert [tiktoken.encode(texts[i]) for i in short] == [theirs[i] for i in short]
    assert [ids.tolist() for ids in tiktoken.encode_arrays(texts)] == tiktoken.encode_batch(texts)


def test_the_fast_path_is_used_only_if_equivalent(converted: Path, vocab_folder: Path) -> None:
    content = json.loads(converted.read_text())
    assert equivalent_encoding(content) is not None
    trained = json.loads((vocab_folder / "tokenizer.json").read_text())
    assert equivalent_encoding(trained) is None  # a trained file lists one merge per token, not all
    for change in (
        lambda c: c.update(normalizer={"type": "NFC"}),
        lambda c: c["model"].update(ignore_merges=False),
        lambda c: c["model"].update(dropout=0.1),
        lambda c: c["model"].update(merges=c["model"]["merges"][1:]),
        lambda c: c["model"].update(merges=c["model"]["merges"][::-1]),
        lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "x"}),
        lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        lambda c: c["added_tokens"][0].update(special=False),
    ):
        changed = json.loads(converted.read_text())
        change(changed)
        assert equivalent_encoding(changed) is None


def test_the_letters_of_bytes() -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert byte_letters() == bytes_to_unicode()


def test_the_fingerprint_covers_everything_that_affects_ids(vocab_folder: Path, tmp_path: Path) -> None:
    original = build_tokenizer("HFTokenizer", vocab_folder).fingerprint
    content = json.loads((vocab_folder / "tokenizer.json").read_text())
    content["post_processor"] = None
    content["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    resaved = build_tokenizer("HFTokenizer", tmp_path)
    assert resaved.fingerprint == original
    assert len(resaved.encode("one two three four five six")) > 4
    content["pre_tokenizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert build_tokenizer("HFTokenizer", tmp_path).fingerprint != original


def test_refusals(vocab_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"CharLevelTokenizer.*use one of HFTokenizer"):
        build_tokenizer("CharLevelTokenizer", vocab_folder)
    with pytest.raises(TokenizerError, match="no such file"):
        build_tokenizer("HFTokenizer", tmp_path / "absent.json")
    with pytest.raises(TokenizerError, match="not a Hugging Face"):
        build_tokenizer("HFTokenizer", vocab_folder / "tokenizer.model")
    with pytest.raises(TokenizerError, match="line 1: expected a base64"):
        build_tokenizer("TiktokenTokenizer", vocab_folder / "tokenizer.json")
    with pytest.raises(TokenizerError, match="not a SentencePiece model"):
        build_tokenizer("SPMTokenizer", vocab_folder / "tokenizer.model")
    lines = (vocab_folder / "tokenizer.model").read_bytes().splitlines()
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines[:300] + lines[301:]))
    with pytest.raises(TokenizerError, match="truncated"):
        build_tokenizer("TiktokenTokenizer", tmp_path)
    content = json.loads((vocab_folder / "tokenizer.json").read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<|end_of_text|>"]
    shutil.rmtree(tmp_path / "x", ignore_errors=True)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match="no end-of-document token"):
        build_tokenizer("HFTokenizer", tmp_path)
