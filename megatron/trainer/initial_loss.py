"""The guard against a continued run that starts as a random model."""

from __future__ import annotations

import math

from megatron.engine.nonfinite import SuspiciousLossError
from megatron.neox_arguments import NeoXArgs

MARGIN_NATS = 2.0


def check_initial_loss(loss: float, args: NeoXArgs) -> None:
    """Refuse a continued run whose first loss is near ln(vocabulary), that of a model which knows nothing.

    Llama-3.1 starts near 2 on English text; a wrong packing order or a misplaced epsilon shows as 10 to 12.
    """
    limit = math.log(args.vocab_size) - MARGIN_NATS
    if args.from_scratch or args.allow_high_initial_loss or loss <= limit:
        return
    raise SuspiciousLossError(
        f"the first loss of this continued run is {loss:.2f}; a model that knows nothing has "
        f"ln({args.vocab_size}) = {math.log(args.vocab_size):.2f}, and more than {limit:.2f} is not a trained Llama. "
        "Likely: a checkpoint converted with another packing, a wrong rms_norm_epsilon, rope_scaling or tokenizer. "
        "Compare it with its source: python tools/convert_hf verify HF_DIR NEOX_DIR --forward. "
        "If the loss is right (another language, unusual text), rerun with --allow-high-initial-loss true"
    )
