"""What `generate.py` does on every rank: load a checkpoint, continue every prompt, write JSON lines."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.load import load_weights
from megatron.common.errors import UserError
from megatron.common.log import log_on_rank_0
from megatron.engine.build import build_inference_engine
from megatron.generation.interactive import show, typed_prompts
from megatron.generation.text import continue_text
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.collective_errors import RankGroup
from megatron.parallel.place import Place
from megatron.parallel.process_groups import initialize
from megatron.supervision.status_store import Whereabouts
from megatron.supervision.step_timers import StepTimers
from megatron.supervision.watchdog import Watchdog
from megatron.tokenizer import build_tokenizer


def generate_text(args: NeoXArgs) -> None:
    """Continue every prompt (or start from the beginning-of-text token); JSON lines with GPT-NeoX's fields.

    With `text_gen_type: interactive` what is typed is continued on the screen.
    """
    place = initialize(args)
    log_on_rank_0(place.rank)
    with Watchdog(args, place) as watchdog:
        records = _continuations(args, place, watchdog.whereabouts)
    if place.rank == 0 and args.text_gen_type != "interactive":
        _write_samples(Path(args.sample_output_file), records)


def _continuations(args: NeoXArgs, place: Place, whereabouts: Whereabouts) -> list[dict[str, Any]]:
    assert args.vocab_file is not None  # checked with the configuration
    tokenizer = build_tokenizer(args.tokenizer_type, args.vocab_file, args.merge_file)
    interactive = args.text_gen_type == "interactive"
    prompts = typed_prompts(RankGroup.world(place.device)) if interactive else _prompts(args)
    engine = build_inference_engine(args, place, StepTimers(whereabouts, place.device).during)
    load_weights(engine, args)
    generator = torch.Generator().manual_seed(args.seed)
    records = []
    for prompt in prompts:
        start = time.perf_counter()
        beginning = [] if tokenizer.bos is None else [tokenizer.bos]
        ids = beginning + tokenizer.encode(prompt)
        if interactive and len(ids) >= args.seq_length:
            show(place, f"a prompt of {len(ids)} tokens; expected at most {args.seq_length - 1} (seq_length - 1)")
            continue
        new, finished = continue_text(engine, args, ids, tokenizer.eod, generator)
        if interactive:
            show(place, tokenizer.decode(new))
            continue
        records.append(
            {
                "context": prompt,
                "text": tokenizer.decode(new),
                "length": len(new),
                "finished": finished,
                "message": None,
                "duration_seconds": time.perf_counter() - start,
            }
        )
    return records


def _prompts(args: NeoXArgs) -> list[str]:
    if args.text_gen_type == "unconditional":
        return [""] * args.num_samples
    assert args.sample_input_file is not None  # checked with the configuration
    path = Path(args.sample_input_file)
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(
            f"sample_input_file {path}: {error.strerror}; give a text file with one prompt a line"
        ) from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"sample_input_file {path} has no prompt; write one a line")
    return prompts


def _write_samples(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    for record in records:
        print(f"{record['context']!r} -> {record['text']!r}")
    print(f"written to {path}")
