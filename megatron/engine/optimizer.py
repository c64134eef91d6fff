"""AdamW and its parameter groups, which follow the layout table: a row says whether weight decay applies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from megatron import layout
from megatron.neox_arguments import ConfigError, NeoXArgs

# These names are in the log and the checkpoint; for the two kinds that a text model has, they are GPT-NeoX's.
GROUP_NAMES = {
    # (decays, replicated)
    (True, False): "weight_decay_params",
    (False, True): "no_weight_decay_params",
    (True, True): "weight_decay_replicated_params",
    (False, False): "no_weight_decay_sharded_params",
}
REPLICATED_GROUPS = frozenset(name for (_, replicated), name in GROUP_NAMES.items() if replicated)


def group_names(shape: layout.LlamaShape) -> list[str]:
    """Names of the parameter groups of a model, over all stages."""
    kinds = {(row.decays, row.replicated) for _, _, rows in layout.layer_files(shape) for row in rows}
    return [name for kind, name in GROUP_NAMES.items() if kind in kinds]


def rows_of_parameters(
    layers: Iterable[tuple[int, nn.Module]], shape: layout.LlamaShape
) -> list[tuple[nn.Parameter, layout.TensorRow]]:
    """Every parameter of some numbered layers with its row of the layout table; LookupError if it has none."""
    return [
        (parameter, layout.row_of(index, name, shape))
        for index, layer in layers
        for name, parameter in layer.named_parameters()
    ]


def mark_sharded(parameters: Iterable[tuple[nn.Parameter, layout.TensorRow]]) -> None:
    """Mark the parameters that are sharded over tensor-parallel ranks, for the gradient norms of both engines.

    Unmarked parameters are replicated, and count once per tensor-parallel group.
    """
    for parameter, row in parameters:
        parameter.tensor_model_parallel = not row.replicated  # type: ignore[attr-defined]


def require_training(stages: Sequence[range], args: NeoXArgs) -> None:
    """Raise ConfigError unless every stage, given by its layer file numbers, has a parameter to train with `lora`.

    DeepSpeed would refuse a stage without one while the other stages wait for it until they time out.
    """
    decoder = layout.file_indices(layout.LayerFile.DECODER, args.num_layers)
    for number, layers in enumerate(stages):
        if not set(layers) & set(decoder):
            raise ConfigError(
                f"stage {number} holds layers {layers.start} to {layers.stop - 1} and no decoder layer: with lora it "
                f"has nothing to train; write pipe_partition_method: type:transformer|mlp, or use fewer stages"
            )


def adapter_and_slice_lines(args: NeoXArgs) -> list[str]:
    """Log lines about the trained parameters with `lora` and the slice per rank with `sequence_parallel`."""
    lines = []
    if args.lora is not None:
        lora, trained, whole = args.lora, args.trained_shape.num_parameters, args.whole_shape.num_parameters
        lines.append(
            f"lora: rank {lora.rank}, scale {lora.scale:g}, {', '.join(lora.projections)}; {trained:,} of {whole:,} "
            f"parameters are trained ({trained / whole:.2%})"
        )
    if args.sequence_parallel:
        tp, length = args.model_parallel_size, args.seq_length
        lines.append(
            f"sequence parallel: between layers each of {tp} tensor-parallel ranks holds {length // tp} of {length} "
            "tokens"
        )
    return lines


def parameter_groups(
    parameters: Iterable[nn.Parameter], rows: dict[int, layout.TensorRow], weight_decay: float
) -> list[dict[str, Any]]:
    """One group for each kind of parameter that this rank trains, in the given order; `rows` is keyed by `id`.

    Frozen parameters are in no group. Matrices (including embedding and head) decay, norms do not: GPT-NeoX's grouping.
    Empty groups are omitted, so that stages may differ in their groups: a stage may hold only an embedding.
    """
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUP_NAMES.values()}
    decays = {name: decayed for (decayed, _), name in GROUP_NAMES.items()}
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        row = rows[id(parameter)]
        groups[GROUP_NAMES[row.decays, row.replicated]].append(parameter)
    return [
        {"params": members, "weight_decay": weight_decay if decays[name] else 0.0, "name": name}
        for name, members in groups.items()
        if members
    ]


def build_optimizer(groups: list[dict[str, Any]], args: NeoXArgs) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over this rank's parameter groups; an engine shards its state by ZeRO-1."""
    beta1, beta2 = args.optimizer.params.betas
    return torch.optim.AdamW(groups, lr=args.lr, betas=(beta1, beta2), eps=args.optimizer.params.eps, fused=True)
