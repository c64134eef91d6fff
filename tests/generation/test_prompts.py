"""Prompts are checked before a model is loaded, samples are written as they come, and text ends at a turn's end."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.common.errors import UserError
from megatron.generation import prompts, text
from megatron.tokenizer import Tokenizer

pytestmark = pytest.mark.unit


def args(vocab_folder: Path, folder: Path, **changes: Any) -> Any:
    keys = {
        "vocab_file": str(vocab_folder),
        "tokenizer_type": "HFTokenizer",
        "sample_input_file": str(folder / "prompts.txt"),
        "sample_output_file": str(folder / "deep/out.jsonl"),
        "seq_length": 32,
        "vocab_size": 1024,
        "maximum_tokens": 8,
        "seed": 1,
    }
    return SimpleNamespace(**{**keys, **changes})


PLACE: Any = SimpleNamespace(rank=0, device="cpu")


def refuse(*_: Any) -> Any:
    pytest.fail("the model was built")


@pytest.fixture
def without_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "build_inference_engine", refuse)
    monkeypatch.setattr(prompts, "StepTimers", lambda *_: SimpleNamespace(during=None))


@pytest.mark.usefixtures("without_model")
def test_bad_prompts_stop_before_the_model_is_loaded(vocab_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    for content, message, changes in (
        (b"short\n\nalso short\n" + b"long " * 100 + b"\n", r"prompts.txt, line 4: a prompt of \d+ tokens", {}),
        ("Ångström\n".encode("latin-1"), "prompts.txt: not UTF-8 text", {}),
        (b"\n \n", "has no prompt", {}),
        (b"short\n", "line 1: a prompt with token id", {"vocab_size": 300}),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            list(prompts._continuations(args(vocab_folder, tmp_path, **changes), PLACE, None))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="No such file"):
        list(prompts._continuations(args(vocab_folder, tmp_path, sample_input_file="absent"), PLACE, None))  # type: ignore[arg-type]


def test_samples_are_written_as_they_come(vocab_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\u2028still two\nthree\n", encoding="utf-8")
    monkeypatch.setattr(prompts, "initialize", lambda _: PLACE)
    monkeypatch.setattr(
        prompts, "Watchdog", lambda *_: __import__("contextlib").nullcontext(SimpleNamespace(whereabouts=None))
    )
    monkeypatch.setattr(prompts, "build_inference_engine", lambda *_: None)
    monkeypatch.setattr(prompts, "load_weights", lambda *_: None)
    monkeypatch.setattr(prompts, "StepTimers", lambda *_: SimpleNamespace(during=None))
    done = 0

    def answer(*_: Any) -> tuple[list[int], bool]:
        nonlocal done
        done += 1
        if done == 3:
            raise RuntimeError("the node is gone")
        return [65, 66], True

    monkeypatch.setattr(prompts, "continue_text", answer)
    with pytest.raises(RuntimeError, match="the node is gone"):
        prompts.generate_text(args(vocab_folder, tmp_path))
    written = [
        json.loads(line) for line in (tmp_path / "deep/out.jsonl").read_text(encoding="utf-8").split("\n") if line
    ]
    assert [record["context"] for record in written] == ["one", "two\u2028still two"]


@pytest.mark.parametrize("end", ["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"])
def test_text_ends_at_the_end_of_a_turn(
    end: str, vocab_folder: Path, hf_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coming = iter([70, 71, hf_tokenizer.token_id(end), 72])
    monkeypatch.setattr(text, "_next_token", lambda *_: next(coming))
    engine: Any = None
    new = text.continue_text(engine, args(vocab_folder, tmp_path), [1, 2], hf_tokenizer.ends, torch.Generator())
    assert new == ([70, 71], True)
