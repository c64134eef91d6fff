"""Chooses the implementations of operations that have several, before the model is built, and logs the choice."""

from __future__ import annotations

import logging

import torch

from megatron.model.attention import document_attention_on
from megatron.model.pipeline import PARAMETER_DTYPES
from megatron.neox_arguments import NeoXArgs
from megatron.ops import configure
from megatron.parallel.place import Place

logger = logging.getLogger(__name__)


def choose_operations(args: NeoXArgs, place: Place) -> None:
    """Choose for the fused operations and for attention within isolated documents; errors of `ops.configure`."""
    logger.info(configure(args.kernels, place.device))
    if args.isolate_documents:
        logger.info(f"isolated documents on {place.device.type}: {how_documents_are_attended_to(args, place.device)}")


def how_documents_are_attended_to(args: NeoXArgs, device: torch.device) -> str:
    heads, kv_heads = (number // args.model_parallel_size for number in (args.num_attention_heads, args.num_kv_heads))
    return document_attention_on(device.type, PARAMETER_DTYPES[args.precision], heads, kv_heads, args.head_dim).how
