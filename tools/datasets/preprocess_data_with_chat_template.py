"""Conversations -> `.bin/.idx` of tokens and labels, with GPT-NeoX's flags and its ids.

    python tools/datasets/preprocess_data_with_chat_template.py --input chats.jsonl --jsonl-keys messages \\
        --output-prefix data/sft --tokenizer-path Meta-Llama-3.1-8B-Instruct

writes `data/sft_messages_document` and `data/sft_messages_label_document`, for `train_data_paths` and
`train_label_data_paths`. A line holds `{"messages": [{"role": ..., "content": ...}, ...]}`. For other formats of
conversations, deduplication and shares, use `preprocess_sft.py`, whose ids differ by the end token that GPT-NeoX adds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if TYPE_CHECKING:
    from megatron.data.indexed import IndexedWriter
    from tools.datasets.encoding.growing_prefixes import PrefixChat

Pair = tuple[list[int], list[int]]  # ids, labels
_REWARDS = "reward models and their data are not supported; conversations and labels are"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", required=True, help="JSON lines; several files are separated by commas")
    p.add_argument("--jsonl-keys", nargs="+", default=["conversation"], help="fields to encode, one output each")
    p.add_argument("--no-mask", action="store_true", help="learn all tokens; write no label files and no end token")
    p.add_argument("--generation-role", default="assistant", help="role whose turns are learned")
    p.add_argument("--only-last", action="store_true", help="learn only the last turn")
    p.add_argument("--tokenizer-path", required=True, help="folder of tokenizer.json and tokenizer_config.json")
    p.add_argument(
        "--output-prefix", required=True, help="outputs are PREFIX_KEY_document and PREFIX_KEY_label_document"
    )
    p.add_argument("--dataset-impl", default="mmap", choices=["mmap"], help="the only format (GPT-NeoX's flag)")
    p.add_argument("--workers", type=int, default=1, help="processes")
    p.add_argument("--num-docs", type=int, help="number of input documents, for a percentage in the progress lines")
    p.add_argument("--log-interval", type=int, default=10_000, help="documents between progress lines")
    p.add_argument("--ftfy", action="store_true", help="accepted for GPT-NeoX compatibility; no effect, as in GPT-NeoX")
    for name in ("--for-rm", "--binary-reward"):
        p.add_argument(name, action="store_true", help=f"refused: {_REWARDS}")
    p.add_argument("--reward-key", help=f"refused: {_REWARDS}")
    return p


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    from megatron.common.boundary import guarded

    return guarded("preprocess_data_with_chat_template.py", lambda: convert(options))


def convert(options: argparse.Namespace) -> None:
    """Run the preprocessing. Raises UserError or OSError and then leaves nothing behind."""
    import numpy as np

    from megatron.data.indexed import IndexedWriter
    from tools.datasets.encoding.growing_prefixes import ChatFileError, PrefixChat

    if options.for_rm or options.binary_reward or options.reward_key:
        raise ChatFileError(_REWARDS)
    chat = PrefixChat(Path(options.tokenizer_path))
    names = [f"{key}{kind}" for key in options.jsonl_keys for kind in (("",) if options.no_mask else ("", "_label"))]
    outputs = {name: Path(f"{options.output_prefix}_{name}_document") for name in names}
    for path in outputs.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.int32)
    writers = {name: IndexedWriter(_aside(path), dtype) for name, path in outputs.items()}
    try:
        learned = _write(options, chat, writers)
        for writer in writers.values():
            writer.finish()
    except BaseException:
        for path in outputs.values():
            for suffix in (".bin", ".idx", ".sizes"):
                Path(f"{_aside(path)}{suffix}").unlink(missing_ok=True)
        raise
    for path in outputs.values():
        for suffix in (".bin", ".idx"):
            os.replace(f"{_aside(path)}{suffix}", f"{path}{suffix}")
    for key in options.jsonl_keys:
        tokens = writers[key].bytes // dtype.itemsize
        share = f", {learned[key]} of them learned" if not options.no_mask else ""
        print(f"{outputs[key]}: {writers[key].documents} conversations, {tokens} tokens{share}", file=sys.stderr)


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _write(options: argparse.Namespace, chat: PrefixChat, writers: dict[str, IndexedWriter]) -> dict[str, int]:
    """Encode all lines in order; returns the number of learned tokens by key."""
    import numpy as np

    from megatron.common.labels import IGNORE_INDEX
    from tools.datasets.encoding.growing_prefixes import ChatFileError

    learned = dict.fromkeys(options.jsonl_keys, 0)
    with multiprocessing.get_context("fork").Pool(options.workers, _start, (chat, options)) as pool:
        for number, result in enumerate(pool.imap(_encode, _lines(options.input.split(",")), chunksize=25), 1):
            if isinstance(result, str):
                raise ChatFileError(result)
            for key, (ids, labels) in result.items():
                writers[key].add(np.array(ids))
                learned[key] += sum(label != IGNORE_INDEX for label in labels)
                if not options.no_mask:
                    writers[f"{key}_label"].add(np.array(labels))
            if number % options.log_interval == 0:
                part = f" of {options.num_docs} ({number / options.num_docs:.0%})" if options.num_docs else ""
                print(f"{number}{part} conversations", file=sys.stderr)
    if not any(writer.documents for writer in writers.values()):
        raise ChatFileError(f"{options.input}: no conversation in it")
    return learned


def _lines(files: list[str]) -> Iterator[tuple[str, str]]:
    """(file and line number, text) of every non-blank line."""
    for name in files:
        with open(name, encoding="utf-8", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{name}:{number}", line


_WORK: dict[str, Any] = {}


def _start(chat: PrefixChat, options: argparse.Namespace) -> None:
    _WORK.update(chat=chat, options=options)


def _encode(item: tuple[str, str]) -> dict[str, Pair] | str:
    """The pairs of a line by key, or the problem with it."""
    from tools.datasets.encoding.growing_prefixes import ChatFileError

    place, line = item
    options = _WORK["options"]
    try:
        line.encode()
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ChatFileError(f"expected an object, found {type(record).__name__}")
        missing = [key for key in options.jsonl_keys if key not in record]
        if missing:
            raise ChatFileError(f"no field {missing[0]}; the fields are {', '.join(list(record)[:8]) or 'none'}")
        arguments = (options.generation_role, options.only_last, not options.no_mask)
        return {key: _WORK["chat"].ids_and_labels(record[key], *arguments) for key in options.jsonl_keys}
    except UnicodeEncodeError:
        return f"{place}: not UTF-8"
    except (ChatFileError, ValueError) as error:
        return f"{place}: {error}"


if __name__ == "__main__":
    sys.exit(main())
