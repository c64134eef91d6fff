"""What GPT-NeoX writes to its log and to TensorBoard, under its names, for the tools that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron.evaluation.perplexity import Evaluation
from megatron.neox_arguments import NeoXArgs

_UNITS = ("", "KFLOPS", "MFLOPS", "GFLOPS", "TFLOPS", "PFLOPS")


def flops_per_second(args: NeoXArgs, seconds: float) -> float:
    """FLOP/s of a rank by GPT-NeoX's formula (Narayanan et al. 2021, equation 3), including recomputation.

    It assumes an MLP of 4 x hidden_size and as many key/value heads as query heads. With an adapter, which GPT-NeoX
    does not have, the weights' own gradients are not included.
    """
    hidden, layers, length = args.hidden_size, args.num_layers, args.seq_length
    passes = (4 if args.checkpoint_activations else 3) - (args.lora is not None)
    shape = 1 + length / (6 * hidden) + args.padded_vocab_size / (16 * layers * hidden)
    per_step = 24 * passes * args.train_batch_size * length * layers * hidden**2 * shape
    return per_step / (seconds * args.global_num_gpus)


def interval_scalars(args: NeoXArgs, seconds: float) -> dict[str, float]:
    """`runtime/*` of GPT-NeoX for steps of `seconds`, except those that this project also records itself."""
    return {
        "runtime/samples_per_sec": args.train_batch_size / seconds,
        "runtime/steps_per_sec": 1 / seconds,
        "runtime/flops_per_sec_per_gpu": flops_per_second(args, seconds),
    }


def interval_fields(
    args: NeoXArgs,
    seconds: float,
    learning_rate: float,
    losses: Sequence[float],
    loss_scale: float | None,
    skipped: int,
    not_finite: int,
) -> str:
    """The fields of GPT-NeoX's line after `log_interval` steps of `seconds`: means and counts over these steps."""
    mean = sum(losses) / len(losses) if losses else float("nan")
    fields = [
        f"samples/sec: {args.train_batch_size / seconds:.3f}",
        f"elapsed time per iteration (ms): {seconds * 1e3:.1f}",
        f"learning rate: {learning_rate:.3E}",
        f"approx flops per GPU: {_readable(flops_per_second(args, seconds))}",
        f"{args.loss_name}: {mean:.6E}",
        *([] if loss_scale is None else [f"loss scale: {loss_scale:.1f}"]),
        f"number of skipped iterations: {skipped:3d}",
        f"number of nan iterations: {not_finite:3d}",
    ]
    return " | ".join(fields)


def evaluation_scalars(args: NeoXArgs, result: Evaluation, prefix: str) -> dict[str, float]:
    """A loss of validation or test data, and for text its perplexity, under GPT-NeoX's names."""
    name = f"{prefix}{args.loss_name}"
    return {name: result.loss} | ({} if args.reads_images else {f"{name}_ppl": result.perplexity})


def evaluation_line(kind: str, iteration: int, scalars: Mapping[str, float]) -> str:
    values = "".join(f" {name} value: {value:.6E} |" for name, value in scalars.items())
    return f"{kind} results at iteration {iteration} |{values}"


def _readable(flops: float) -> str:
    for unit in _UNITS[:-1]:
        if flops < 1000:
            return f"{flops:3.1f}{unit}"
        flops /= 1000
    return f"{flops:3.1f}{_UNITS[-1]}"
