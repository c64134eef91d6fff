"""Text files -> `.bin/.idx`, with GPT-NeoX's flags.

    python tools/datasets/preprocess_data.py --input corpus.jsonl.zst --output-prefix data/corpus \\
        --tokenizer-type HFTokenizer --vocab-file Meta-Llama-3.1-8B/tokenizer.json --prepend-bos --append-eod

writes `data/corpus_text_document.bin`, `.idx` and `.json` (the header that training checks). Input is JSON lines
(plain, .gz, .zst), Parquet or plain text; commas, globs and folders are understood. The output is the same, byte for
byte, for any number of workers. A run that was killed goes on where it was when started again with the same
arguments; a run that fails leaves nothing behind.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", nargs="+", required=True, help="files, globs or folders; commas separate, too")
    p.add_argument("--jsonl-keys", nargs="+", default=["text"], help="fields to tokenize, one output each")
    p.add_argument("--output-prefix", required=True, help="outputs are PREFIX_KEY_document.{bin,idx,json}")
    p.add_argument("--tokenizer-type", required=True, help="HFTokenizer, TiktokenTokenizer or SPMTokenizer")
    p.add_argument("--vocab-file", required=True, help="tokenizer.json or tokenizer.model, or the folder it is in")
    p.add_argument("--merge-file", help="accepted from GPT-NeoX's scripts; no supported tokenizer has one")
    p.add_argument("--prepend-bos", action="store_true", help="put the begin-of-text id before every document")
    p.add_argument("--append-eod", action="store_true", help="put the end-of-text id behind every document")
    p.add_argument("--ftfy", action="store_true", help="repair mis-decoded Unicode with ftfy first")
    p.add_argument("--dataset-impl", default="mmap", choices=["mmap"], help="the only format (GPT-NeoX's flag)")
    p.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)")
    p.add_argument("--num-docs", type=int, help="number of input documents, for a percentage in the progress lines")
    p.add_argument("--log-interval", type=int, default=10_000, help="documents between progress lines")
    p.add_argument(
        "--on-bad-record", choices=["fatal", "skip"], default="fatal", help="stop at an unreadable record, or count it"
    )
    return p


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    from megatron.data.indexed import DataError
    from megatron.tokenizer import TokenizerError
    from tools.datasets.encoding.pipeline import BadRecord
    from tools.datasets.encoding.records import SourceError

    try:
        preprocess_texts(options)
    except (BadRecord, DataError, SourceError, TokenizerError, OSError) as error:
        print(f"preprocess_data.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("preprocess_data.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def preprocess_texts(options: argparse.Namespace) -> None:
    """Raises BadRecord, DataError, SourceError, TokenizerError, OSError."""
    from megatron.data.indexed import token_dtype
    from megatron.tokenizer import TokenizerError, build_tokenizer
    from tools.datasets.encoding.encode import TextEncoder
    from tools.datasets.encoding.pipeline import EncodingJob, HeaderMaker, IndexedOutput, identity_of, run_encoding
    from tools.datasets.encoding.records import expand, read_blocks

    if options.merge_file:
        print(f"--merge-file {options.merge_file} is not read: the merges are in --vocab-file", file=sys.stderr)
    keys: list[str] = [key for item in options.jsonl_keys for key in item.split(",")]
    files = expand(options.input)
    tokenizer = build_tokenizer(options.tokenizer_type, options.vocab_file)
    if options.prepend_bos and tokenizer.bos is None:
        raise TokenizerError(f"{tokenizer.path}: no begin-of-text token, --prepend-bos cannot be done")
    tokenizer.encode_arrays([""])  # what it prepares at its first use, the workers inherit
    bos = tokenizer.bos if options.prepend_bos else None
    eod = tokenizer.eod if options.append_eod else None
    dtype = token_dtype(tokenizer.vocab_size)

    header = HeaderMaker(tokenizer, dtype, bos, eod, options.ftfy, files)
    run_encoding(
        EncodingJob(
            identity=identity_of(tokenizer, files, [bos, eod, options.ftfy, keys, options.on_bad_record]),
            encoder=TextEncoder(tokenizer, keys, dtype, bos, eod, options.ftfy),
            blocks=(block for file in files for block in read_blocks(file, keys)),
            outputs=[IndexedOutput(f"{options.output_prefix}_{key}_document", dtype, header) for key in keys],
            journal=Path(f"{options.output_prefix}.partial.json"),
            workers=options.workers,
            skip_bad=options.on_bad_record == "skip",
            log_interval=options.log_interval,
            num_docs=options.num_docs,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
