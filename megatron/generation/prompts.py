"""What `generate.py` does on every rank: load a checkpoint, continue every prompt, write JSON lines."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from megatron.checkpoint.load import load_weights
from megatron.common.errors import UserError
from megatron.common.log import log_on_rank_0
from megatron.engine.build import build_inference_engine
from megatron.generation.interactive import show, typed_prompts
from megatron.generation.text import check_prompt, continue_text
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.collective_errors import RankGroup
from megatron.parallel.place import Place
from megatron.parallel.process_groups import initialize
from megatron.supervision.status_store import Whereabouts
from megatron.supervision.step_timers import StepTimers
from megatron.supervision.watchdog import Watchdog
from megatron.tokenizer import Tokenizer, build_tokenizer


def generate_text(args: NeoXArgs) -> None:
    """Continue every prompt (or start from the beginning-of-text token); JSON lines with GPT-NeoX's fields.

    With `text_gen_type: interactive` what is typed is continued on the screen.
    """
    place = initialize(args)
    log_on_rank_0(place.rank)
    path = Path(args.sample_output_file)
    with Watchdog(args, place) as watchdog, contextlib.ExitStack() as stack:
        if args.text_gen_type == "interactive":
            _converse(args, place, watchdog.whereabouts)
            return
        samples = _continuations(args, place, watchdog.whereabouts)
        out = None
        for record in samples:
            if place.rank == 0:
                out = out or stack.enter_context(_open_samples(path))
                out.write(json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n")
                out.flush()
                print(f"{record['context']!r} -> {record['text']!r}", flush=True)
    if place.rank == 0:
        print(f"written to {path}")


def _converse(args: NeoXArgs, place: Place, whereabouts: Whereabouts) -> None:
    """Continue what is typed, on the screen of rank 0. A prompt that cannot be continued is answered with why."""
    tokenizer, beginning = _tokenizer(args)
    engine = build_inference_engine(args, place, StepTimers(whereabouts, place.device).during)
    load_weights(engine, args)
    generator = torch.Generator().manual_seed(args.seed)
    for prompt in typed_prompts(RankGroup.world(place.device)):
        ids = beginning + tokenizer.encode(prompt)
        try:
            check_prompt(args, ids)
        except UserError as error:
            show(place, str(error))
            continue
        new, _ = continue_text(engine, args, ids, tokenizer.ends, generator)
        show(place, tokenizer.decode(new))


def _tokenizer(args: NeoXArgs) -> tuple[Tokenizer, list[int]]:
    """The tokenizer, and what a text begins with."""
    assert args.vocab_file is not None  # checked with the configuration
    tokenizer = build_tokenizer(args.tokenizer_type, args.vocab_file, args.merge_file)
    return tokenizer, [] if tokenizer.bos is None else [tokenizer.bos]


def _open_samples(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("wb")


def _continuations(args: NeoXArgs, place: Place, whereabouts: Whereabouts) -> Iterator[dict[str, Any]]:
    """One record after the other. All prompts are checked before the model is loaded."""
    tokenizer, beginning = _tokenizer(args)
    # A text from nothing begins with the token that ends documents where none begins them (GPT-2), as in GPT-NeoX.
    prompts = [(number, text, beginning + tokenizer.encode(text) or [tokenizer.eod]) for number, text in _prompts(args)]
    for number, _, ids in prompts:
        try:
            check_prompt(args, ids)
        except UserError as error:
            where = f"{args.sample_input_file}, line {number}: " if args.sample_input_file else ""
            raise UserError(f"{where}{error}") from None
    engine = build_inference_engine(args, place, StepTimers(whereabouts, place.device).during)
    load_weights(engine, args)
    generator = torch.Generator().manual_seed(args.seed)
    for _, text, ids in prompts:
        start = time.perf_counter()
        new, finished = continue_text(engine, args, ids, tokenizer.ends, generator)
        yield {
            "context": text,
            "text": tokenizer.decode(new),
            "length": len(new),
            "finished": finished,
            "message": None,
            "duration_seconds": time.perf_counter() - start,
        }


def _prompts(args: NeoXArgs) -> list[tuple[int, str]]:
    """(line, prompt), lines counted from 1."""
    if args.text_gen_type == "unconditional":
        return [(0, "")] * args.num_samples
    assert args.sample_input_file is not None  # checked with the configuration
    path = Path(args.sample_input_file)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"sample_input_file {path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it first"
        ) from None
    except OSError as error:
        raise UserError(
            f"sample_input_file {path}: {error.strerror}; give a text file with one prompt a line"
        ) from None
    prompts = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise UserError(f"sample_input_file {path} has no prompt; write one a line")
    return prompts
