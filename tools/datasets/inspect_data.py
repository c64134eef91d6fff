"""The contents of a `.bin/.idx` pair: counts, lengths, decoded documents, and which tokens are learned.

    python tools/datasets/inspect_data.py data/corpus_text_document --vocab-file tokenizer.json --samples 2
    python tools/datasets/inspect_data.py data/sft_general_document --vocab-file tokenizer.json --show-mask

Without a tokenizer, only counts are shown. `--histogram lengths.png` draws the lengths. With `--show-mask`, text that
the model learns is green (or in [[ ]] if the output is not a terminal).

    python tools/datasets/inspect_data.py data/galaxies --samples 12 --grid galaxies.png --patch-size 8 --order spiral

For images, the grid shows a selection; with a patch size, also the patch boundaries and each patch's sequence number.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from megatron.data.indexed import IndexedFile
    from megatron.tokenizer import Tokenizer

BAR = 50  # characters of the longest bar of the histogram


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("prefix", help="path without .bin or .idx")
    p.add_argument("--tokenizer-type", default="HFTokenizer")
    p.add_argument("--vocab-file", help="tokenizer file, to decode documents")
    p.add_argument("--samples", type=int, default=3, help="number of documents to show, chosen at random")
    p.add_argument("--document", type=int, action="append", help="show this document (from 0; may be repeated)")
    p.add_argument("--seed", type=int, default=0, help="seed of the random choice")
    p.add_argument("--max-chars", type=int, default=2000, help="characters shown per document; 0 shows all")
    p.add_argument("--show-mask", action="store_true", help="mark the learned text, according to the label file")
    p.add_argument("--labels", help="prefix of the label file (default: PREFIX with _label before _document)")
    p.add_argument("--seq-length", type=int, help="of the run: count documents longer than a sample")
    p.add_argument("--histogram", type=Path, help="draw the lengths of the documents as PNG")
    p.add_argument("--grid", type=Path, help="images: draw the chosen ones as PNG")
    p.add_argument("--patch-size", type=int, help="images: show how they are cut into patches")
    p.add_argument("--order", choices=["spiral", "raster"], default="spiral", help="order of the patches")
    p.add_argument("--color", choices=["auto", "always", "never"], default="auto")
    return p


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    from megatron.common.boundary import guarded

    return guarded("inspect_data.py", lambda: inspect(options))


def inspect(options: argparse.Namespace) -> None:
    """Print and draw what the options ask for. Raises UserError, OSError."""
    from megatron.data.header import check_header, holds_images, read_header
    from megatron.data.indexed import DataError, IndexedFile
    from megatron.tokenizer import TokenizerError, build_tokenizer
    from tools.datasets.imaging.inspecting import inspect_images

    if holds_images(options.prefix):
        for line in inspect_images(options):
            print(line)
        return
    if options.grid or options.patch_size:
        raise DataError(f"--grid and --patch-size are for images, and {options.prefix} holds text")
    file = IndexedFile(options.prefix)
    tokenizer = build_tokenizer(options.tokenizer_type, options.vocab_file) if options.vocab_file else None
    header = read_header(file.prefix)
    if header is not None and tokenizer is not None:
        check_header(file.prefix, header, tokenizer, None)
    print("\n".join(data_summary(file, options.seq_length)))
    if options.histogram:
        draw_lengths(file, options.histogram)
    labels = None
    if options.show_mask:
        labels = IndexedFile(options.labels or label_prefix(options.prefix))
        print(f"learned: {learned_share(labels)}")
    if tokenizer is not None:
        show(file, labels, tokenizer, options)
    elif options.show_mask or options.document:
        raise TokenizerError("decoding documents needs a tokenizer: give --vocab-file (and --tokenizer-type)")


def label_prefix(prefix: str) -> str:
    """GPT-NeoX's name for the label file of a text file."""
    return prefix.removesuffix("_document") + "_label_document"


def data_summary(file: IndexedFile, seq_length: int | None = None) -> list[str]:
    """Counts, quantiles of the lengths, the header, documents longer than a sample, and a histogram."""
    import numpy as np

    from megatron.data.header import read_header
    from tools.datasets.encoding.counts import summary_of, summary_table

    sizes = file.sizes
    quantiles = np.quantile(sizes, [0, 0.05, 0.5, 0.95, 1]).astype(int).tolist()
    lines = [
        f"{file.prefix}: {len(file)} documents, {file.num_tokens} tokens as {file.dtype}, "
        f"{file.num_tokens * file.dtype.itemsize / 1e6:.1f} MB",
        f"tokens per document: mean {file.num_tokens / len(file):.1f}; least {quantiles[0]}, 5 % {quantiles[1]}, "
        f"median {quantiles[2]}, 95 % {quantiles[3]}, most {quantiles[4]}",
    ]
    header = read_header(file.prefix)
    if header is None:
        lines.append("no header for this index: tokenizer and document frame are unknown")
    else:
        made_by = header.tokenizer
        lines.append(
            f"tokenizer {made_by.type}, {made_by.vocab_size} ids, {made_by.fingerprint[:19]}; "
            f"BOS {header.bos}, EOD {header.eod}; {header.empty} empty and {header.skipped} unreadable skipped"
        )
        if header.input_bytes and header.tokens:
            lines.append(f"{header.input_bytes / header.tokens:.2f} bytes of text per token")
        for reason in header.bad_files:
            lines.append(f"unreadable file, skipped: {reason}")
        if header.unknown_keys:
            fields = ", ".join(f"{key} ({count:,})" for key, count in header.unknown_keys.items())
            lines.append(f"unused fields, and the number of records that have them: {fields}")
        if header.chat is not None:
            lines.append(
                f"chat template {header.chat.template}, trained on {header.chat.train_on} assistant turns: "
                f"{header.chat.learned_tokens} tokens learned "
                f"({header.chat.learned_tokens / max(header.tokens, 1):.1%})"
            )
            summary = summary_of(Path(file.prefix).name, header)
            if summary is not None:
                lines += ["", *summary_table([summary]).splitlines(), ""]
    if seq_length is not None:
        longer = sizes > seq_length + 1
        share = int(sizes[longer].sum(dtype=np.int64)) / max(file.num_tokens, 1)
        lines.append(
            f"longer than a sample of {seq_length:,} tokens: {int(longer.sum()):,} of {len(file):,} documents "
            f"({longer.mean():.1%}), with {share:.1%} of the tokens"
        )
    powers = np.bincount(np.ceil(np.log2(np.maximum(sizes, 1))).astype(int))
    for power, count in enumerate(powers.tolist()):
        if count:
            lines.append(
                f"  up to {2**power:>9} tokens {'#' * max(1, round(BAR * count / powers.max())):<{BAR}} {count}"
            )
    return lines


def learned_share(labels: IndexedFile) -> str:
    """Read all labels; a line with the count of learned tokens."""
    learned = sum(int((document >= 0).sum()) for document in labels)
    silent = sum(1 for document in labels if not (document >= 0).any())
    share = f"{learned} of {labels.num_tokens} tokens ({learned / labels.num_tokens:.1%})"
    return f"{share}; {silent} documents have no learned token"


def draw_lengths(file: IndexedFile, path: Path) -> None:
    """Draw a histogram of the lengths on a logarithmic axis."""
    import numpy as np

    from megatron.data.indexed import DataError

    try:
        import matplotlib
    except ImportError as error:
        raise DataError("--histogram needs the package matplotlib (pip install .[data])") from error

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    edges = np.geomspace(max(1, file.sizes.min()), max(2, file.sizes.max() + 1), 60)
    axes.hist(file.sizes, bins=edges.tolist(), color="#4477aa")
    axes.set(xscale="log", xlabel="tokens per document", ylabel="documents", title=Path(file.prefix).name)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"lengths drawn to {path}")


def show(file: IndexedFile, labels: IndexedFile | None, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    """Decode the chosen documents."""
    import numpy as np

    from megatron.data.indexed import DataError

    if labels is not None and not np.array_equal(file.sizes, labels.sizes):
        raise DataError(f"{labels.prefix}: these labels do not belong to {file.prefix}, the lengths differ")
    chosen = options.document
    if chosen is None:
        count = min(options.samples, len(file))
        chosen = np.random.RandomState(options.seed).choice(len(file), count, replace=False).tolist()
    color = options.color == "always" or (options.color == "auto" and sys.stdout.isatty())
    for number in chosen:
        if not 0 <= number < len(file):
            raise DataError(f"--document {number}: {file.prefix} has documents 0 to {len(file) - 1}")
        ids = file.document(number)
        print(f"\n--- document {number}, {len(ids)} tokens")
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= tokenizer.vocab_size):
            raise DataError(
                f"{file.prefix}: document {number} has ids from {ids.min()} to {ids.max()}, but the tokenizer "
                f"{tokenizer.path} only 0 to {tokenizer.vocab_size - 1}; it is not the tokenizer of this data"
            )
        mask = labels.document(number) >= 0 if labels is not None else np.zeros(len(ids), bool)
        text = marked(ids, mask, tokenizer, ("\x1b[32m", "\x1b[0m") if color else ("[[", "]]"), options.max_chars)
        print(text)


def marked(
    ids: NDArray[np.integer],
    mask: NDArray[np.bool_],
    tokenizer: Tokenizer,
    marks: tuple[str, str],
    max_chars: int,
) -> str:
    """The text of `ids` with `marks` around masked tokens, cut off after about `max_chars` characters (0: never)."""
    import numpy as np

    if len(ids) == 0:
        return ""
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    parts, length = [], 0
    for start, stop in itertools.pairwise(edges):
        text = tokenizer.decode(ids[start:stop].tolist())
        if max_chars and length + len(text) > max_chars:
            text = text[: max_chars - length] + " ..."
        parts.append(f"{marks[0]}{text}{marks[1]}" if mask[start] else text)
        length += len(text)
        if max_chars and length > max_chars:
            break
    return "".join(parts)


if __name__ == "__main__":
    sys.exit(main())
