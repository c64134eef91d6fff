"""Train a Kneser-Ney n-gram model on trusted text, for `clean_corpus.py --perplexity-model`.

    python tools/datasets/train_ngram.py --input wikipedia.jsonl.zst --output wikipedia.arpa

Counting and smoothing use `kaldingram`; words are prepared as in `clean_corpus.py`. Unknown words get their Good-Turing
probability: the fraction of words seen once, spread over as many words as were seen. All counts are held in memory, so
use at most a few hundred megabytes of text. For more, KenLM's own `lmplz` writes the same format.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.common.quantity import quantity

if TYPE_CHECKING:
    from tools.datasets.encoding.records import InputFiles


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", nargs="+", required=True, help="as in clean_corpus.py")
    p.add_argument("--output", type=Path, required=True, help="the .arpa file")
    p.add_argument("--text-key", default="text", help="the field to read")
    p.add_argument("--order", type=int, default=3, help="words in the longest sequence, at most 6 (default: 3)")
    return p


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    from megatron.common.boundary import guarded

    return guarded(
        "train_ngram.py",
        lambda: write_ngram(options.input, options.output, options.text_key, options.order),
        "stopped; nothing was written",
    )


def write_ngram(inputs: list[str], output: Path, key: str, order: int) -> None:
    """Train and write the model. Raises DataError, SourceError, OSError; the output is either complete or absent."""
    from megatron.common.atomic_files import replacing
    from megatron.data.indexed import DataError
    from tools.datasets.encoding.records import find_inputs

    if not 2 <= order <= 6:
        raise DataError(f"--order {order}: expected 2 to 6")
    if output.suffix != ".arpa":
        raise DataError(f"--output {output}: expected a name that ends in .arpa")
    try:
        from kaldingram.train import main as kneser_ney
    except ImportError as error:
        raise DataError("training an n-gram needs the package kaldingram (pip install .[data])") from error
    files = find_inputs(inputs)
    files.check([key])
    counts = Counter(word for line in _lines(files, key) for word in line.split(" "))
    once = sum(1 for count in counts.values() if count == 1)
    if once == len(counts):
        raise DataError(f"{', '.join(inputs)}: no word occurs twice; this is not a corpus")
    unknown = math.log10(max(1, once) / counts.total() / len(counts))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".partial.") as folder:
        corpus, closed = Path(folder) / "corpus.txt", Path(folder) / "closed.arpa"
        with corpus.open("w", encoding="utf-8", errors="replace") as file:
            file.writelines(f"{line}\n" for line in _lines(files, key))
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            kneser_ney(["--ngram-order", str(order), "--text", str(corpus), "--lm", str(closed)])
        with replacing(output) as model, closed.open("rb") as source, model.open("wb") as target:
            for line in source:
                if line.startswith(b"ngram 1="):
                    line = b"ngram 1=%d\n" % (int(line[8:]) + 1)
                target.write(line)
                if line.startswith(b"\\1-grams:"):
                    target.write(b"%.7f\t<unk>\n" % unknown)
    read = quantity(len(files.files), "file")
    print(f"{output}: {order}-gram of {counts.total()} words, {len(counts)} distinct, from {read}")


def _lines(files: InputFiles, key: str) -> Iterator[str]:
    """Lines of words from all records. DataError for a record without text."""
    from megatron.data.indexed import DataError
    from tools.datasets.cleaning.perplexity import word_lines
    from tools.datasets.encoding.progress import Progress
    from tools.datasets.encoding.records import RecordError, read_record, text_of

    progress, records = Progress(files.bytes), 0
    for block in files.blocks([key], [key], progress):
        for position in range(len(block)):
            try:
                record = read_record(block, position)
                text = "" if record is None else text_of(record, key)
            except RecordError as error:
                raise DataError(f"{block.where(position)}: {error}") from None
            records += 1
            yield from word_lines(text)
        if progress.due(records):
            print(f"{records:,} documents, {progress.left()}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
