"""The guard against a continued run that starts from what is effectively a random model."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from megatron.engine.batches import StepBatch
from megatron.engine.nonfinite import SuspiciousLossError
from megatron.model.patches import PatchScale, zero_loss
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.place import Place

MARGIN_NATS = 2.0
MARGIN_SHARE = 0.01  # of the Huber loss; AstroPT's recipe ends 5 % below the loss of an untrained model


def check_initial_loss(loss: float, args: NeoXArgs, of_the_mean: float | None = None) -> None:
    """Refuse a continued run whose first loss is near that of an untrained model.

    For text that is ln(vocabulary): Llama-3.1 starts near 2 on English text; a wrong packing order or a misplaced
    epsilon gives 10 to 12. For images it is `of_the_mean`, the result of `loss_of_predicting_the_mean`.
    """
    if args.from_scratch or args.allow_high_initial_loss:
        return
    if of_the_mean is not None:
        limit, digits = of_the_mean * (1 - MARGIN_SHARE), 4
        what = f"the mean Huber loss {of_the_mean:.4f} of predicting the mean"
        likely = "patches that are cut, ordered or scaled differently"
    else:
        ignorant = math.log(args.vocab_size)
        limit, digits = ignorant - MARGIN_NATS, 2
        what = f"ln({args.vocab_size}) = {ignorant:.2f}"
        likely = "a wrong rms_norm_epsilon, rope_scaling or tokenizer"
    if loss <= limit:
        return
    raise SuspiciousLossError(
        f"the first loss of this continued run is {loss:.{digits}f}; an untrained model has {what}, and more "
        f"than {limit:.{digits}f} is not a trained Llama. "
        f"Likely: a checkpoint converted with another packing, {likely}. "
        "Compare it with its source: python tools/convert_hf verify HF_DIR NEOX_DIR (--forward, for text). "
        "If the loss is right (another language, unusual text or images), rerun with --allow-high-initial-loss true"
    )


def loss_of_predicting_the_mean(args: NeoXArgs, batch: StepBatch, place: Place) -> float:
    """Huber loss of predicting the mean value, over the learned patches of the global batch. Collective."""
    assert args.patches is not None
    scale, total = PatchScale(args.patches), torch.zeros((), dtype=torch.float64, device=place.device)
    if place.counts_tokens:
        for micro_batch in batch.micro_batches or ():
            targets, mask = (micro_batch[name].to(place.device) for name in ("targets", "mask"))
            total += (zero_loss(scale, targets) * mask).sum()
    dist.all_reduce(total)
    return float(total) / batch.learned_tokens
