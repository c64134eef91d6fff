"""generate.py: a thousand prompts including a bad line, and a typed conversation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.common.errors import UserError
from tests.support.checkpoints import write_weights
from tests.support.deepy_runs import ROOT
from tests.support.models import Case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

CASE = Case(heads=4, kv_heads=2, head_dim=8, layers=2, intermediate=48, vocab=1024, seq=192)
BAD = 417
COUNT = 1000


def _continue(rank: int, world_size: int, keys: dict[str, Any]) -> str:
    """The final error of a run of generate.py on this rank."""
    from megatron.generation.generate import Batching, Generator
    from megatron.generation.prompts import continue_all, endings_of, read_requests
    from megatron.generation.requests import PromptReader
    from megatron.tokenizer import build_tokenizer
    from tests.support.engine_runs import inference

    args = CASE.neox(world_size=world_size, **keys)
    engine = inference(args, dict(CASE.hugging_face().state_dict()))
    assert args.vocab_file is not None
    tokenizer = build_tokenizer("HFTokenizer", args.vocab_file)
    generator = Generator(engine, args, Batching(slots=48))
    reader = PromptReader(args, tokenizer, None)
    try:
        requests = read_requests(args, engine.place, reader)
        continue_all(generator, requests, endings_of(args, tokenizer, None))
    except UserError as error:
        return str(error)
    finally:
        generator.close()
    return ""


def test_no_prompt_is_lost_to_a_bad_line(vocab_folder: Path, tmp_path: Path) -> None:
    """Two replicas of two stages, prompts of 1 to 40 words, texts of varying length."""
    lines = [json.dumps({"prompt": "word " * (1 + number % 40 // 2), "id": number}) for number in range(COUNT)]
    lines[BAD] = lines[BAD][:-3]
    (tmp_path / "p.jsonl").write_text("\n".join(lines) + "\n")
    keys = {
        "vocab_file": str(vocab_folder / "tokenizer.json"),
        "sample_input_file": str(tmp_path / "p.jsonl"),
        "sample_output_file": str(tmp_path / "out" / "samples.jsonl"),
        "maximum_tokens": 6,
        "temperature": 1.0,
        "stop": ["e"],
        "pipe_parallel_size": 2,
    }
    errors = run_ranks(_continue, 4, keys)
    expected = f"1 of {COUNT} prompts of {tmp_path / 'p.jsonl'} were not continued, all others are in "
    assert [error.startswith(expected) for error in errors] == [True] * 4
    assert f"line {BAD + 1}: not JSON" in errors[0]
    records = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(COUNT))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["samples.jsonl"], "parts are put together"
    bad = records.pop(BAD)
    assert (bad["text"], bad["end"], bad["context"]) == (None, "error", lines[BAD])
    assert "not JSON" in bad["message"]
    assert [record["input"]["id"] for record in records] == [n for n in range(COUNT) if n != BAD]
    assert {record["end"] for record in records} == {"stop", "length"}
    assert all(record["finished"] == (record["end"] == "stop") for record in records)
    assert all("e" not in record["text"] for record in records)
    # The same prompts on one rank: the text depends only on seed and prompt.
    (tmp_path / "few.jsonl").write_text("\n".join(lines[:9]) + "\n")
    few = keys | {
        "sample_input_file": str(tmp_path / "few.jsonl"),
        "sample_output_file": str(tmp_path / "few.out"),
        "pipe_parallel_size": 1,
    }
    assert run_ranks(_continue, 1, few) == [""]
    again = [json.loads(line)["text"] for line in (tmp_path / "few.out").read_text().splitlines()]
    assert again == [record["text"] for record in records[:9]]


def _generated(rank: int, world_size: int, keys: dict[str, Any]) -> None:
    from megatron.generation import prompts
    from megatron.parallel.process_groups import form_groups
    from tests.support.models import load_hugging_face

    prompts.initialize = form_groups
    state = dict(CASE.hugging_face().state_dict())
    prompts.load_weights = lambda engine, args: load_hugging_face(engine, state, args)
    prompts.generate_text(CASE.neox(world_size=world_size, heartbeat_timeout_seconds=0, **keys))


def test_sequence_parallelism_in_training_does_not_change_texts(vocab_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("word\nword word word\n")
    texts = []
    for sequence_parallel in (False, True):
        output = tmp_path / f"{sequence_parallel}.jsonl"
        keys = {
            "vocab_file": str(vocab_folder / "tokenizer.json"),
            "sample_input_file": str(tmp_path / "p.txt"),
            "sample_output_file": str(output),
            "maximum_tokens": 6,
            "temperature": 0.0,
            "model_parallel_size": 2,
            "sequence_parallel": sequence_parallel,
        }
        run_ranks(_generated, 2, keys)
        texts.append([json.loads(line)["text"] for line in output.read_text().splitlines()])
    assert len(texts[0]) == 2
    assert texts[0] == texts[1]


def _stops_before_the_model(rank: int, world_size: int, keys: dict[str, Any]) -> str:
    from megatron.generation import prompts
    from megatron.parallel.process_groups import form_groups

    def refuse(*_: Any) -> Any:
        raise AssertionError("the model was built")

    prompts.initialize = form_groups
    prompts.build_inference_engine = refuse
    try:
        prompts.generate_text(CASE.neox(world_size=world_size, heartbeat_timeout_seconds=0, **keys))
    except UserError as error:
        return str(error)
    raise AssertionError("no error")


def test_a_file_that_cannot_be_read_stops_before_the_model_is_loaded(vocab_folder: Path, tmp_path: Path) -> None:
    keys = {"vocab_file": str(vocab_folder), "sample_input_file": str(tmp_path / "absent.txt")}
    for error in run_ranks(_stops_before_the_model, 2, keys | {"model_parallel_size": 2}):
        assert error.startswith("reading the prompts failed. rank 0: sample_input_file")
        assert "No such file" in error


@pytest.fixture(scope="module")
def checkpoint(vocab_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random weights for TP2, and model.yml."""
    folder = tmp_path_factory.mktemp("model")
    args = CASE.neox(world_size=1)
    write_weights(folder / "weights", args.shape, tp=2)
    left_out = {"from_scratch", "train_data_paths", "optimizer"}
    keys = {key: value for key, value in args.merged.items() if key not in left_out}
    keys |= {"vocab_file": str(vocab_folder / "tokenizer.json"), "load": str(folder / "weights")}
    (folder / "model.yml").write_text(yaml.safe_dump(keys))
    return folder


def _deepy(checkpoint: Path, typed: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "deepy.py", "generate.py", str(checkpoint / "model.yml"), *options]
    return subprocess.run(command, cwd=ROOT, input=typed, capture_output=True, text=True, timeout=200, check=False)


def test_a_conversation_is_typed(checkpoint: Path) -> None:
    """On two ranks: two turns, a command, a turn that does not fit, a new conversation, the end."""
    typed = f"What is z?\n\nAnd M?\n/what\n{'long ' * 150}\n/reset\nHi\n/exit\nnever read\n"
    options = ["--chat", "--thinking", "on", "--maximum_tokens", "12", "--max_thinking_tokens", "3"]
    done = _deepy(checkpoint, typed, "--model_parallel_size", "2", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("<think>") == done.stdout.count("</think>") == 3
    assert done.stderr.count("tokens/s, ended by length)") == 3
    assert "/what is not a command" in done.stderr
    assert "not continued: it has" in done.stderr
    assert "a new conversation" in done.stderr


@pytest.mark.slow
def test_single_prompts_are_typed(checkpoint: Path) -> None:
    options = ["--text_gen_type", "interactive", "--model_parallel_size", "2", "--maximum_tokens", "5"]
    done = _deepy(checkpoint, "one\ntwo\nstop\nthree\n", *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("(5 tokens") == 2
