"""How a rank's device computes what there are several ways for: chosen before the model is built, and said once."""

from __future__ import annotations

import logging

from megatron.model.attention import document_attention_on
from megatron.model.pipeline import PARAMETER_DTYPES
from megatron.neox_arguments import NeoXArgs
from megatron.ops import configure
from megatron.parallel.place import Place

logger = logging.getLogger(__name__)


def choose_operations(args: NeoXArgs, place: Place) -> None:
    """Of the fused operations, and of attention within isolated documents. KernelsUnavailable as `ops.configure`."""
    logger.info(configure(args.kernels, place.device))
    if args.isolate_documents:
        heads, kv_heads = args.num_attention_heads // place.tp, args.num_kv_heads // place.tp
        dtype = PARAMETER_DTYPES[args.precision]
        logger.info(document_attention_on(place.device.type, dtype, heads, kv_heads, args.head_dim).description)
