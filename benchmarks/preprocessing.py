"""preprocess_data.py compared with a one-process loop over the same tokenizer, on real text, in one run.

    python benchmarks/preprocessing.py [--vocab-file Meta-Llama-3.1-8B/tokenizer.json] [--megabytes 64]

Measured in alternation, median and range over the rounds: a loop over `tokenizers`' own `encode`, document by document;
its batch call on one core and on all cores, the ceiling of that library; this project's encoder on one core; the whole
command (including start-up, reading JSON, encoding, writing and checksums) on all cores; and `datasets.map` with the
same number of processes. The command on a single document gives the start-up time. The last line compares the peak
memory of the command (its largest process) on the input and on twice the input.
Without --vocab-file, the vocabulary of Meta's `llama-models` is used, written as tokenizer.json by `transformers`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import tokenizers  # noqa: E402

from benchmarks.corpus import real_documents  # noqa: E402
from megatron.data.header import read_header  # noqa: E402
from megatron.tokenizer import build_tokenizer  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-file", type=Path)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocab = options.vocab_file or meta_vocabulary(folder)
        documents = list(real_documents(options.megabytes * 1_000_000))
        for label, texts in (("once", documents), ("twice", documents * 2), ("start", documents[:1])):
            (folder / f"{label}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        report = measure(folder, vocab, documents, options)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure(folder: Path, vocab: Path, documents: list[str], options: argparse.Namespace) -> dict[str, float]:
    size = sum(len(text.encode()) for text in documents) / 1e6
    library = tokenizers.Tokenizer.from_file(str(vocab))
    ours = build_tokenizer("HFTokenizer", vocab)
    ours.encode_arrays(["x"])
    runs: dict[str, Callable[[], object]] = {
        "tokenizers: loop over encode, 1 process": lambda: [
            library.encode(d, add_special_tokens=False).ids for d in documents
        ],
        "tokenizers: encode_batch_fast, 1 core": lambda: library.encode_batch_fast(documents, add_special_tokens=False),
        f"tokenizers: encode_batch_fast, {options.workers} processes": lambda: on_all_cores(
            library, documents, options.workers
        ),
        "this project's encoder, 1 core": lambda: ours.encode_arrays(documents),
        f"preprocess_data.py, {options.workers} workers": lambda: command(folder, vocab, "once", options.workers),
        f"datasets.map, {options.workers} processes": lambda: datasets_map(folder, library, options.workers),
        "preprocess_data.py on one document": lambda: command(folder, vocab, "start", options.workers),
    }
    # Run everything in turn in each round, so that other load affects all alike.
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            os.sync()  # finish pending writes of the previous run
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    header = read_header(folder / "once_text_document")
    assert header is not None
    print(f"{size:.1f} MB of real text, {len(documents)} documents, {header.tokens} tokens, {options.rounds} rounds")
    starts = seconds.pop("preprocess_data.py on one document")
    whole = f"preprocess_data.py, {options.workers} workers"
    seconds[f"{whole}, without its start"] = [a - b for a, b in zip(seconds[whole], starts, strict=True)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    loop = next(iter(medians.values()))
    print(f"the start takes {statistics.median(starts):.1f} s")
    for name, values in seconds.items():
        print(
            f"{name:<50} {size / medians[name]:6.2f} MB/s ({size / max(values):.2f} to {size / min(values):.2f})  "
            f"{header.tokens / medians[name]:>10,.0f} tokens/s   {loop / medians[name]:5.2f} x the loop"
        )
    once, twice = (command(folder, vocab, label, options.workers) for label in ("once", "twice"))
    print(
        f"peak memory of the largest process: {once:.0f} MiB, with twice the input {twice:.0f} MiB "
        f"({twice / once - 1:+.1%})"
    )
    return {**{f"{name} [MB/s]": size / value for name, value in medians.items()}, "peak": once, "peak, twice": twice}


def on_all_cores(library: tokenizers.Tokenizer, documents: list[str], workers: int) -> None:
    """The maximum of the library: every process encodes its part and discards the result."""
    children = []
    for worker in range(workers):
        child = os.fork()
        if child == 0:
            library.encode_batch_fast(documents[worker::workers], add_special_tokens=False)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def command(folder: Path, vocab: Path, label: str, workers: int) -> float:
    """Run preprocess_data.py; the peak resident memory of its largest process, MiB."""
    arguments = ["--input", folder / f"{label}.jsonl", "--output-prefix", folder / label, "--vocab-file", vocab]
    arguments += ["--tokenizer-type", "HFTokenizer", "--append-eod", "--workers", workers]
    process = subprocess.Popen(
        [sys.executable, ROOT / "tools/datasets/preprocess_data.py", *map(str, arguments)],
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"preprocess_data.py failed with exit code {process.returncode}")
    return usage.ru_maxrss / 1024


def datasets_map(folder: Path, library: tokenizers.Tokenizer, workers: int) -> None:
    import datasets

    datasets.disable_caching()
    data = datasets.load_dataset("json", data_files=str(folder / "once.jsonl"), split="train", cache_dir=str(folder))
    data.map(
        lambda rows: {"ids": [e.ids for e in library.encode_batch_fast(rows["text"], add_special_tokens=False)]},
        batched=True,
        num_proc=workers,
        remove_columns=["text"],
    )


def meta_vocabulary(folder: Path) -> Path:
    """Llama 3's vocabulary as a tokenizer.json, without a download."""
    import llama_models.llama3.tokenizer
    from transformers import AddedToken
    from transformers.convert_slow_tokenizer import TikTokenConverter

    from megatron.tokenizer.llama3 import SPECIAL_TOKENS, SPLIT_PATTERN

    model = Path(llama_models.llama3.tokenizer.__file__).parent / "tokenizer.model"
    converted = TikTokenConverter(vocab_file=str(model), pattern=SPLIT_PATTERN).converted()
    converted.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
    converted.model.ignore_merges = True
    converted.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


if __name__ == "__main__":
    sys.exit(main())
