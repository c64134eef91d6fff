"""The command line: `python tools/convert_hf VERB ...`."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.common.boundary import guarded_from_sigterm
from megatron.common.quantity import quantity

from .errors import ConvertError
from .formats.dtypes import ALIASES

_SIZES = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 `verify` found a difference or `inspect --serving` a gap, 2 bad input, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    again = "interrupted; the same command with --resume continues"
    return guarded_from_sigterm("convert_hf", lambda: int(arguments.run(arguments)), again)


def size(text: str) -> int:
    """Parse a size such as 5GB, 512MiB or 4000000 into bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?", text.strip().upper())
    if not match or match[2] not in _SIZES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 512MiB")
    return int(float(match[1]) * _SIZES[match[2]])


def share(text: str) -> tuple[int, int]:
    """Parse a share i/n of the work into (i, n)."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= 999:
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n with 1 <= i <= n")
    return int(match[1]), int(match[2])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python tools/convert_hf",
        description="Convert Llama checkpoints between Hugging Face and GPT-NeoX, bit for bit, at the speed of a copy.",
    )
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    _add_to_neox(verbs)
    _add_reshard(verbs)
    _add_to_hf(verbs)
    _add_verify(verbs)
    _add_inspect(verbs)
    return parser


def _add_to_neox(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = _converting(
        verbs,
        "to-neox",
        "Hugging Face or Meta weights to GPT-NeoX pipeline layer files",
        "Reads safetensors, pytorch_model*.bin or Meta's consolidated.*.pth and writes layer files that serve every "
        "pipeline size at the given tensor-parallel size, with `latest`, a manifest and a ready model.yml.",
    )
    verb.add_argument(
        "--tp", type=int, required=True, help="tensor-parallel size (model_parallel_size) of the training run"
    )
    _divisible(verb)
    verb.set_defaults(run=_run_neox)


def _add_reshard(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = _converting(
        verbs,
        "reshard",
        "a GPT-NeoX checkpoint from one layout to another",
        "Rewrites the weights of a checkpoint for another tensor-parallel size, and with --optimizer the optimizer "
        "states for another TP x PP x DP. A run resumes from the result as from its own checkpoint.",
    )
    verb.add_argument("--tp", type=int, required=True, help="the new tensor-parallel size")
    _divisible(verb)
    verb.add_argument("--optimizer", action="store_true", help="include the optimizer states of a training checkpoint")
    verb.add_argument("--pp", type=int, metavar="P", help="with --optimizer: pipeline stages (default: unchanged)")
    verb.add_argument("--dp", type=int, metavar="D", help="with --optimizer: data-parallel size (default: unchanged)")
    verb.set_defaults(run=_run_reshard)


def _add_to_hf(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = _converting(
        verbs,
        "to-hf",
        "GPT-NeoX weights to a Hugging Face folder",
        "Writes safetensors, with config.json, tokenizer, chat template and license copied from the source; a "
        "model trained on conversations gets their chat template and end tokens.",
    )
    verb.add_argument(
        "--shard-size",
        type=size,
        metavar="SIZE",
        help="largest safetensors file, such as 5GB (default: as sharded in the source, else 5GB)",
    )
    verb.add_argument(
        "--trained-settings",
        action="store_true",
        help="write the training run's epsilon and rotary settings into config.json where they differ",
    )
    verb.add_argument(
        "--base-chat",
        action="store_true",
        help="keep the source's end tokens and chat template even if the model was trained on conversations",
    )
    verb.add_argument(
        "--adapter",
        type=Path,
        metavar="DIR",
        help="add a LoRA adapter (a peft folder, or the checkpoints of a LoRA run) to the weights, and print how much "
        "of it rounding loses; --dtype float32 loses almost nothing",
    )
    verb.add_argument(
        "--adapter-base",
        metavar="NAME",
        help="name of the base as recorded in the adapter, if the base's folder has another name",
    )
    verb.set_defaults(run=_run_hf)


def _add_verify(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "verify",
        help="compare two checkpoints of any kind, or one with its manifest",
        description="Compares every tensor, epsilon and the rotary settings of two checkpoints (Hugging Face, Meta, "
        "GPT-NeoX at any TP). With --forward, both run on the same tokens, one layer at a time from disk. A single "
        "checkpoint is compared with the checksums of its manifest. Exit code 0: equal, 1: different.",
    )
    verb.add_argument("checkpoints", type=Path, nargs="+", metavar="DIR", help="one or two checkpoint folders")
    verb.add_argument("--forward", action="store_true", help="run both models and report the first layer that diverges")
    verb.add_argument("--tokens", type=Path, metavar="FILE", help="token ids for --forward (default: 128 fixed ids)")
    verb.add_argument("--tolerance", type=float, default=1e-4, help="relative, for --forward (default 1e-4)")
    verb.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="for --forward")
    _describing(verb)
    verb.add_argument("--max-ram", type=size, default=512 << 20, metavar="SIZE", help="memory limit (default 512MiB)")
    verb.add_argument("--threads", type=int, default=4, metavar="N", help="reading threads (default 4)")
    verb.add_argument("--quiet", action="store_true", help="no progress bar")
    verb.set_defaults(run=_run_verify)


def _add_inspect(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "inspect",
        help="list what a folder contains and what is missing",
        description="Opens a checkpoint of any kind and prints its format, sizes, types, shards and missing pieces.",
    )
    verb.add_argument("checkpoint", type=Path, metavar="DIR")
    _describing(verb)
    verb.add_argument("--json", action="store_true", help="machine-readable, with every tensor")
    verb.add_argument(
        "--serving",
        action="store_true",
        help="check that a Hugging Face folder has what vLLM, SGLang and llama.cpp need; exit code 1 if it does not",
    )
    verb.set_defaults(run=_run_inspect)


def _divisible(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--vocab-divisible-by",
        type=int,
        metavar="M",
        help="pad the vocabulary to a multiple of M x TP (make_vocab_size_divisible_by; default: the source's, else 1 "
        "if TP divides the vocabulary, else 128)",
    )


def _converting(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str, description: str
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=summary, description=description)
    verb.add_argument("--input", type=Path, required=True, metavar="DIR", help="the checkpoint to read")
    verb.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="the folder to write; appears when complete"
    )
    _describing(verb)
    verb.add_argument("--dtype", choices=sorted(ALIASES), help="change the type (default: keep every bit)")
    verb.add_argument("--max-ram", type=size, default=512 << 20, metavar="SIZE", help="memory limit (default 512MiB)")
    verb.add_argument("--threads", type=int, default=4, metavar="N", help="copying threads (default 4)")
    verb.add_argument(
        "--shard", type=share, default=(1, 1), metavar="i/n", help="do share i of n; run one share on each of n hosts"
    )
    verb.add_argument("--resume", action="store_true", help="continue an interrupted conversion")
    verb.add_argument("--force", action="store_true", help="replace a finished or interrupted output of this command")
    verb.add_argument("--plan", action="store_true", help="print the whole job and stop")
    verb.add_argument("--quiet", action="store_true", help="no progress bar")
    return verb


def _describing(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--hf-source",
        type=Path,
        metavar="DIR",
        help="folder whose config.json and tokenizer describe a NeoX checkpoint",
    )
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field missing from config.json, such as rope_theta=10000; may be repeated",
    )


def _open(path: Path, arguments: argparse.Namespace, quiet: bool = False):  # type: ignore[no-untyped-def]
    from .sources.checkpoint import OpenOptions
    from .sources.llama_config import parse_given
    from .sources.opening import open_checkpoint

    checkpoint = open_checkpoint(path, OpenOptions(arguments.hf_source, parse_given(arguments.set)))
    for note in [] if quiet else checkpoint.notes:
        print(f"note: {note}")
    return checkpoint


def _request(arguments: argparse.Namespace):  # type: ignore[no-untyped-def]
    from .commands.convert import ConversionRequest

    return ConversionRequest(
        output=arguments.output,
        dtype=ALIASES[arguments.dtype] if arguments.dtype else None,
        max_ram=arguments.max_ram,
        threads=arguments.threads,
        shard=arguments.shard,
        resume=arguments.resume,
        force=arguments.force,
        base_chat=getattr(arguments, "base_chat", False),
        trained_settings=getattr(arguments, "trained_settings", False),
    )


def _run_neox(arguments: argparse.Namespace) -> int:
    from .commands.convert import prepare_neox

    source = _open(arguments.input, arguments)
    print(f"source: {source.describe()}")
    output = prepare_neox(source, arguments.tp, arguments.vocab_divisible_by, _request(arguments))
    return _execute(output, arguments)


def _run_reshard(arguments: argparse.Namespace) -> int:
    from .commands.convert import StateRequest, prepare_neox

    if not arguments.optimizer and (arguments.pp is not None or arguments.dp is not None):
        raise ConvertError("--pp and --dp describe the layout of optimizer states: add --optimizer, or leave them out")
    source = _open(arguments.input, arguments)
    print(f"source: {source.describe()}")
    states = StateRequest(arguments.pp, arguments.dp) if arguments.optimizer else None
    output = prepare_neox(source, arguments.tp, arguments.vocab_divisible_by, _request(arguments), states)
    return _execute(output, arguments)


def _run_hf(arguments: argparse.Namespace) -> int:
    from .commands.convert import prepare_hf

    source = _open(arguments.input, arguments)
    print(f"source: {source.describe()}")
    said = len(source.notes)
    bands = None
    if arguments.adapter is not None:
        from .commands.add_adapter import prepare_added

        output, bands = prepare_added(
            source, arguments.adapter, arguments.adapter_base, arguments.shard_size, _request(arguments)
        )
        print(f"adapter: {bands.adapter.root}, rank {bands.adapter.rank}, {len(bands.adapter.factors)} weights")
    elif arguments.adapter_base is not None:
        raise ConvertError("--adapter-base names the base of an adapter: add --adapter, or leave it out")
    else:
        output = prepare_hf(source, arguments.shard_size, _request(arguments))
    for note in source.notes[said:]:
        print(f"note: {note}")
    code = _execute(output, arguments)
    for line in bands.lines() if bands is not None else ():
        print(line)
    return code


def _run_verify(arguments: argparse.Namespace) -> int:
    from .commands.verify import verification_band, verify
    from .verify.compare import own_digests

    if len(arguments.checkpoints) > 2:
        raise ConvertError("verify compares two checkpoints, or one with its manifest")
    opened = [_open(path, arguments) for path in arguments.checkpoints]
    total = sum(t.nbytes for t in opened[0].tensors.values())
    with progress_bar(total, arguments.quiet) as progress:
        if len(opened) == 1:
            differences = own_digests(opened[0], progress)
            lines = [d.text() for d in differences]
            equal = not differences
            lines.append("every file matches its manifest" if equal else "DAMAGED")
        else:
            report = verify(
                *opened,
                forward=arguments.forward,
                tokens=arguments.tokens,
                tolerance=arguments.tolerance,
                device=arguments.device,
                band=verification_band(arguments.max_ram, arguments.threads),
                threads=arguments.threads,
                progress=progress,
            )
            lines, equal = report.lines, report.equal
    print("\n".join(lines))
    return 0 if equal else 1


def _run_inspect(arguments: argparse.Namespace) -> int:
    import json

    from .commands.inspect import checkpoint_facts, facts_table

    if arguments.serving:
        return _run_serving(arguments)
    checkpoint = _open(arguments.checkpoint, arguments, quiet=arguments.json)
    print(json.dumps(checkpoint_facts(checkpoint), indent=2) if arguments.json else facts_table(checkpoint))
    return 0


def _run_serving(arguments: argparse.Namespace) -> int:
    import json

    from .commands.serving import serving_checks, serving_table

    checks = serving_checks(arguments.checkpoint)
    print(json.dumps([vars(check) for check in checks], indent=2) if arguments.json else serving_table(checks))
    return 1 if any(check.verdict == "missing" for check in checks) else 0


def _execute(output, arguments: argparse.Namespace) -> int:  # type: ignore[no-untyped-def]
    from .commands.convert import execute

    if arguments.plan:
        from .commands.show_plan import plan_text

        print(plan_text(output))
        return 0
    start = time.monotonic()
    with progress_bar(output.bytes_to_copy, arguments.quiet) as progress:
        done = execute(output, progress)
    seconds = time.monotonic() - start
    size_ = output.bytes_written
    rate = f"{size_:,} bytes in {seconds:.1f} s ({size_ / max(seconds, 1e-3) / 1e9:.2f} GB/s)"
    if done:
        print("also written: " + ", ".join(sorted(output.extras)))
        if output.left_behind:
            print("left behind: " + ", ".join(output.left_behind))
        states = f"{quantity(len(output.optimizer.names), 'optimizer file')}, " if output.optimizer else ""
        print(f"wrote {output.final}: {quantity(len(output.plan.files), 'weight file')}, {states}{rate}")
    else:
        print(
            f"share {output.shard[0]}/{output.shard[1]} is written, {rate}; "
            f"{output.final} appears when all shares are done"
        )
    return 0


@contextmanager
def progress_bar(total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar of `total` bytes; yields the function that advances it, a no-op if `quiet`."""
    if quiet:
        yield lambda nbytes: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, mininterval=0.5, leave=False) as bar:

        def advance(nbytes: int) -> None:
            bar.update(nbytes)

        yield advance
