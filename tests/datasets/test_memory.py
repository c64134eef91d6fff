"""Peak memory does not grow with the input: checked by bookkeeping here, by measurement in tests marked slow."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.corpus import real_documents
from tools.datasets.encoding.workers import in_order

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
MB = 1_000_000


def peak(script: str, *arguments: object) -> float:
    """MiB of the largest process of a command."""
    words = [sys.executable, str(ROOT / "tools/datasets" / script), *map(str, arguments)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, errors.decode()
    return usage.ru_maxrss / 1024


def corpora(folder: Path, megabytes: int) -> tuple[Path, Path]:
    """A file of a given size in megabytes, and one twice as large."""
    lines = [json.dumps({"text": text}) + "\n" for text in real_documents(megabytes * MB) if len(text) < 200_000]
    once, twice = folder / "once.jsonl", folder / "twice.jsonl"
    once.write_text("".join(lines))
    twice.write_text("".join(lines + lines))
    return once, twice


def test_only_a_few_blocks_are_under_way() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(1, 201):
            taken = number
            yield number

    for workers in (1, 3):
        for done, result in enumerate(in_order(str, items(), workers), start=1):
            assert result == str(done)
            assert taken - done <= 2 * workers


@pytest.mark.slow
def test_preprocessing(vocab_folder: Path, tmp_path: Path) -> None:
    tokenizer = ("--tokenizer-type", "HFTokenizer", "--vocab-file", vocab_folder, "--workers", 2)
    once, twice = (
        peak("preprocess_data.py", "--input", path, "--output-prefix", tmp_path / "x", *tokenizer)
        for path in corpora(tmp_path, 30)
    )
    assert twice < 1.1 * once


@pytest.mark.slow
def test_cleaning(tmp_path: Path) -> None:
    once, twice = (
        peak("clean_corpus.py", "--input", path, "--output", tmp_path / "x.jsonl.zst", "--workers", 2)
        for path in corpora(tmp_path, 20)
    )
    assert twice < 1.1 * once
