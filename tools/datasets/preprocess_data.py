"""Text files -> `.bin/.idx`, with GPT-NeoX's flags.

    python tools/datasets/preprocess_data.py --input corpus.jsonl.zst --output-prefix data/corpus \\
        --tokenizer-type HFTokenizer --vocab-file Meta-Llama-3.1-8B/tokenizer.json --prepend-bos --append-eod

writes `data/corpus_text_document.bin`, `.idx` and `.json` (the header that training checks). Input is JSON lines or
JSON lists (plain, .gz, .zst), Parquet or plain text; commas, globs and folders are accepted. The output is the same,
byte for byte, for any number of workers. A killed run continues where it stopped when restarted with the same
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
    p.add_argument("--input", nargs="+", required=True, help="files, globs or folders, also separated by commas")
    p.add_argument("--jsonl-keys", nargs="+", default=["text"], help="fields to tokenize, one output each")
    p.add_argument("--output-prefix", required=True, help="outputs are PREFIX_KEY_document.{bin,idx,json}")
    p.add_argument(
        "--tokenizer-type", required=True, help="HFTokenizer, TiktokenTokenizer, SPMTokenizer, GPT2BPETokenizer"
    )
    p.add_argument("--vocab-file", required=True, help="tokenizer.json or tokenizer.model, or the folder it is in")
    p.add_argument("--merge-file", help="merges.txt of GPT-2 tokenizers (default: in the folder of vocab.json)")
    p.add_argument("--prepend-bos", action="store_true", help="put the begin-of-text id before every document")
    p.add_argument("--append-eod", action="store_true", help="put the end-of-text id after every document")
    p.add_argument("--ftfy", action="store_true", help="repair mis-decoded Unicode with ftfy first")
    p.add_argument("--dataset-impl", default="mmap", choices=["mmap"], help="the only format (GPT-NeoX's flag)")
    p.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)")
    p.add_argument("--num-docs", type=int, help="number of input documents, for a percentage in the progress lines")
    p.add_argument("--log-interval", type=int, help="documents between progress lines (default: one every ten seconds)")
    p.add_argument(
        "--on-bad-record",
        choices=["fatal", "skip"],
        default="fatal",
        help="stop at an unreadable file or record, or skip and count it",
    )
    return p


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    from megatron.common.boundary import guarded

    return guarded(
        "preprocess_data.py", lambda: preprocess_texts(options), "stopped; the same command continues from here"
    )


def preprocess_texts(options: argparse.Namespace) -> None:
    """Run the preprocessing. Raises UserError, OSError."""
    from megatron.data.indexed import token_dtype
    from megatron.tokenizer import TokenizerError, build_tokenizer
    from tools.datasets.encoding.encode import TextEncoder
    from tools.datasets.encoding.pipeline import EncodingJob, HeaderMaker, IndexedOutput, identity_of, run_encoding
    from tools.datasets.encoding.progress import Progress
    from tools.datasets.encoding.records import find_inputs

    if options.merge_file and options.tokenizer_type not in ("GPT2BPETokenizer", "HFGPT2Tokenizer"):
        print(f"--merge-file {options.merge_file} is not read: the merges are in --vocab-file", file=sys.stderr)
    keys: list[str] = [key for item in options.jsonl_keys for key in item.split(",")]
    skip_bad = options.on_bad_record == "skip"
    inputs = find_inputs(options.input, skip_bad)
    inputs.check(keys)
    tokenizer = build_tokenizer(options.tokenizer_type, options.vocab_file, options.merge_file)
    if options.prepend_bos and tokenizer.bos is None:
        raise TokenizerError(f"{tokenizer.path}: no begin-of-text token, which --prepend-bos needs")
    tokenizer.encode_arrays([""])  # lazy initialization, inherited by the workers
    bos = tokenizer.bos if options.prepend_bos else None
    eod = tokenizer.eod if options.append_eod else None
    dtype = token_dtype(tokenizer.vocab_size)

    progress = Progress(inputs.bytes, options.log_interval)
    header = HeaderMaker(tokenizer, dtype, bos, eod, options.ftfy, inputs)
    states = run_encoding(
        EncodingJob(
            identity=identity_of(tokenizer, inputs.files, [bos, eod, options.ftfy, keys, options.on_bad_record]),
            encoder=TextEncoder(tokenizer, keys, dtype, bos, eod, options.ftfy),
            blocks=inputs.blocks(keys, None, progress),
            progress=progress,
            outputs=[IndexedOutput(f"{options.output_prefix}_{key}_document", dtype, header) for key in keys],
            journal=Path(f"{options.output_prefix}.partial.json"),
            workers=options.workers,
            skip_bad=skip_bad,
            num_docs=options.num_docs,
        )
    )
    if states[0].unknown:
        fields = sorted(states[0].unknown.items(), key=lambda pair: -pair[1])
        shown = ", ".join(f"{key} ({count:,})" for key, count in fields[:10])
        more = f" and {len(fields) - 10} more" if len(fields) > 10 else ""
        print(f"unused fields, and the number of records that have them: {shown}{more}", file=sys.stderr)
    for line in inputs.describe_bad():
        print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
