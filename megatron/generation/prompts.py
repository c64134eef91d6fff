"""`generate.py` on every rank: loads a checkpoint, continues every prompt, writes JSON lines."""

from __future__ import annotations

import time
from pathlib import Path

from megatron.checkpoint.load import load_weights
from megatron.common.errors import UserError
from megatron.common.log import log_on_rank_0
from megatron.common.quantity import quantity
from megatron.engine.build import build_inference_engine
from megatron.generation.conversations import ChatPrompts
from megatron.generation.generate import Batching, Generator
from megatron.generation.images import complete_images
from megatron.generation.interactive import Dialogue
from megatron.generation.requests import PromptReader, Request
from megatron.generation.samples import SampleFile, record_of, record_of_error
from megatron.generation.sampling import RandomNumbers, Sampling
from megatron.generation.sequences import Continuation, Endings
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.collective_errors import RankGroup
from megatron.parallel.place import Place
from megatron.parallel.process_groups import initialize
from megatron.supervision.step_timers import StepTimers
from megatron.supervision.watchdog import Watchdog
from megatron.tokenizer import Tokenizer, build_tokenizer

PRINTED = 8  # a run with at most this many texts prints them; a longer one prints its progress
PROGRESS_SECONDS = 30.0


def generate_text(args: NeoXArgs) -> None:
    """Continue the prompts of a file, an empty prompt, prompts typed at a terminal, or images. Collective.

    The prompts are read before the model is loaded. If a prompt cannot be continued, raises UserError after all others
    have been written.
    """
    if args.reads_images:
        complete_images(args)
        return
    args = args.model_copy(update={"sequence_parallel": False})  # a sequence of one token cannot be sliced
    place = initialize(args)
    log_on_rank_0(place.rank)
    with Watchdog(args, place) as watchdog:
        assert args.vocab_file is not None  # checked with the configuration
        tokenizer = build_tokenizer(args.tokenizer_type, args.vocab_file, args.merge_file)
        chat = None
        if args.chat:
            chat = ChatPrompts.load(args.chat_template, tokenizer, args.system_prompt, args.thinking)
        reader = PromptReader(args, tokenizer, chat)
        requests = read_requests(args, place, reader)
        around = StepTimers(watchdog.whereabouts, place.device).during
        engine = build_inference_engine(args, place, around)
        load_weights(engine, args)
        generator = Generator(engine, args, Batching(args.generation_batch_size, args.prefill_chunk), around)
        endings = endings_of(args, tokenizer, chat)
        try:
            if args.text_gen_type == "interactive":
                Dialogue(generator, reader, sampling_of(args), endings, watchdog.whereabouts).hold()
            else:
                continue_all(generator, requests, endings)
        finally:
            generator.close()


def read_requests(args: NeoXArgs, place: Place, reader: PromptReader) -> list[Request]:
    """Read the prompts on rank 0 and return them on all ranks; none in interactive runs. Collective."""
    ranks = RankGroup.world(place.device, UserError)
    requests: list[Request] = []
    with ranks.together("reading the prompts"):
        if place.rank == 0 and args.text_gen_type == "unconditional":
            requests = reader.unconditional()
        elif place.rank == 0 and args.text_gen_type == "input-file":
            assert args.sample_input_file is not None  # checked with the configuration
            requests = reader.file(Path(args.sample_input_file))
    return ranks.broadcast(requests)


def sampling_of(args: NeoXArgs) -> Sampling:
    return Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)


def endings_of(args: NeoXArgs, tokenizer: Tokenizer, chat: ChatPrompts | None) -> Endings:
    turn = [] if chat is None else chat.chat.end_of_turn
    return Endings(
        tokenizer.ends.union(args.stop_token_ids, turn),
        tuple(args.stop),
        tokenizer.decode,
        args.max_thinking_tokens,
        () if chat is None else chat.closing,
    )


def sequences_of(requests: list[Request], args: NeoXArgs) -> list[Continuation]:
    """`num_samples` sequences for each prompt that can be continued."""
    return [
        Continuation(
            request.number,
            sample,
            request.ids,
            args.maximum_tokens,
            RandomNumbers(args.seed, request.number, sample) if args.temperature else None,
            trace=bool(args.thinking),
        )
        for request in requests
        if request.error is None
        for sample in range(args.num_samples)
    ]


def continue_all(generator: Generator, requests: list[Request], endings: Endings) -> None:
    """Continue the prompts and write the results. Raises UserError at the end if any prompt could not be continued.

    Collective over all ranks.
    """
    args, place = generator.args, generator.place
    ranks = RankGroup.world(place.device, UserError)
    bad = [request for request in requests if request.error is not None]
    sequences = sequences_of(requests, args)
    by_number = {request.number: request for request in requests}
    with ranks.together("opening the output file"):
        output = SampleFile(Path(args.sample_output_file), place)
        if place.rank == 0:
            output.add(map(record_of_error, bad))
    progress = _Progress(len(sequences) if place.rank == 0 else 0)

    def on_end(sequence: Continuation) -> None:
        if place.first_stage and place.tp_rank == 0:
            record = record_of(by_number[sequence.number], sequence, endings, args.show_thinking)
            output.add([record])
            progress.add(record["context"], record["text"])

    start = time.perf_counter()
    own = generator.own_share(sequences)
    generator.run(own, sampling_of(args), endings, on_end=on_end)
    seconds = time.perf_counter() - start
    counted = own if place.first_stage and place.tp_rank == 0 else []
    new = ranks.total(sum(len(sequence.new) for sequence in counted))
    read = ranks.total(sum(len(sequence.prompt) for sequence in counted))
    output.finish()
    if place.rank == 0:
        print(
            f"{quantity(len(requests) - len(bad), 'prompt')}, {quantity(len(sequences), 'text')}: {new} new tokens in "
            f"{seconds:.2f} s, {new / max(seconds, 1e-9):.1f} tokens/s, and {read} tokens of prompts read; key/value "
            f"cache {generator.cache_bytes / 2**20:.1f} MiB on rank 0"
        )
        print(f"written to {output.path}", flush=True)
    if bad:
        reasons = "; ".join(request.error or "" for request in bad[:5]) + ("; ..." if len(bad) > 5 else "")
        raise UserError(
            f"{len(bad)} of {len(requests)} prompts of {args.sample_input_file} were not continued, all others are in "
            f"{output.path}: {reasons}"
        )


class _Progress:
    """Prints the texts of a short run, or the progress of a long one; nothing with a total of 0."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._printed = total, 0, time.monotonic()

    def add(self, context: str, text: str) -> None:
        self._done += 1
        if 0 < self._total <= PRINTED:
            print(f"{context!r} -> {text!r}", flush=True)
        elif self._total and time.monotonic() - self._printed > PROGRESS_SECONDS:
            print(f"{self._done} texts of about {self._total}", flush=True)
            self._printed = time.monotonic()
