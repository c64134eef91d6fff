"""Bytes of every pipeline stage, by kind, at the moment of a training step that needs most.

Pure arithmetic, no torch: the search calls it for thousands of layouts. It describes what this trainer and the pinned
DeepSpeed really hold, read from their source and checked against measured runs (docs/planning.md):

- bf16 (`BF16_Optimizer`): bf16 weights and bf16 gradients, *unsharded* fp32 gradients, and 12 bytes a parameter of
  fp32 master weights and moments, sharded over data-parallel ranks. fp32 (ZeRO-1): fp32 weights and gradients.
- 1F1B keeps min(m, p - stage) micro-batches in flight (`TrainSchedule`), of each of them what the recomputation mode
  leaves stored.
- Of a recomputed layer everything is alive once, while its backward pass runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.model import layout as tensors
from megatron.model.layout import LlamaShape
from megatron.planner.parallel_layout import ParallelLayout

GIB = 1 << 30
FP32 = 4
ELEMENT = {"fp32": 4, "bfloat16": 2}

# RCCL on MI250X: the first communicator takes about 950 MiB of device memory and 90 MiB of context, each further one
# 630 to 650 MiB, none of it seen by torch's allocator (measured on LUMI; see docs/planning.md for the source).
FIRST_COMMUNICATOR = 1 * GIB
FURTHER_COMMUNICATOR = int(0.65 * GIB)


@dataclass(frozen=True)
class StageMemory:
    """What one rank of a pipeline stage holds at its fullest moment, bytes; `layers` are layer-file numbers."""

    stage: int
    layers: range
    decoder_layers: int
    parameters: int  # of one tensor-parallel rank
    weights: int
    gradients: int
    optimizer: int  # fp32 masters and Adam's two moments: this data-parallel rank's shard
    activations: int  # stored for backward, of all micro-batches in flight
    workspace: int  # the layer being differentiated, gradients on their way, reduction buffers
    logits: int
    pipeline: int  # what the engine keeps to receive and send
    tables: int  # rotary cos and sin
    communicators: int  # outside of torch's allocator
    moment: str

    @property
    def by_kind(self) -> dict[str, int]:
        return {kind: getattr(self, kind) for kind in KINDS}

    @property
    def allocated(self) -> int:
        """Peak of tensors: what `torch.cuda.max_memory_allocated` shows."""
        return self.peak - self.communicators

    @property
    def peak(self) -> int:
        return sum(self.by_kind.values())


KINDS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "workspace",
    "logits",
    "pipeline",
    "tables",
    "communicators",
)


def plan_memory(
    shape: LlamaShape,
    layout: ParallelLayout,
    seq_length: int,
    precision: str = "bfloat16",
    *,
    stage_layers: Sequence[range] | None = None,
    isolate_documents: bool = False,
) -> list[StageMemory]:
    """One entry per pipeline stage.

    `precision` is `bfloat16` or `fp32`; `stage_layers` the layer-file numbers of every stage, default DeepSpeed's
    partition by decoder layers. Raises ValueError where the shape does not fit the tensor-parallel size.
    """
    shape.check_tensor_parallel(layout.tensor)
    stages = stage_layers or default_stages(shape.num_layers, layout.pipe)
    return [
        _stage(shape, layout, seq_length, precision, stage, layers, isolate_documents)
        for stage, layers in enumerate(stages)
    ]


def default_stages(num_layers: int, pipe: int) -> list[range]:
    """Layer-file numbers of each stage under `pipe_partition_method: type:transformer`.

    Decoder layers are dealt evenly, the first stages take one more where they do not divide; the embedding goes with
    the first and the norm and head with the last.
    """
    each, more = divmod(num_layers, pipe)
    edges = [0]
    for stage in range(pipe):
        edges.append(edges[-1] + each + (stage < more))
    starts = [tensors.decoder_index(edge) for edge in edges]
    starts[0], starts[-1] = tensors.EMBEDDING_INDEX, tensors.head_index(num_layers) + 1
    return [range(start, stop) for start, stop in zip(starts, starts[1:], strict=False)]


def communicators(layout: ParallelLayout, stage: int) -> int:
    """Process groups of more than one rank that a rank of `stage` uses, each an RCCL communicator."""
    world = layout.world_size > 1
    tensor = layout.tensor > 1
    data = layout.data > 1
    gradient_norm = layout.tensor * layout.pipe > 1
    broadcast = layout.pipe > 1
    neighbours = (stage > 0) + (stage < layout.pipe - 1)
    return world + tensor + data + gradient_norm + broadcast + neighbours


def _communicator_bytes(count: int) -> int:
    return FIRST_COMMUNICATOR + (count - 1) * FURTHER_COMMUNICATOR if count else 0


@dataclass(frozen=True)
class _Sizes:
    """Bytes of the tensors of one micro-batch on one rank."""

    hidden: int  # residual stream [s, b, h]; its slice under sequence parallelism
    gathered: int  # [s, b, h] whole
    qkv: int
    rotated: int  # q and k after the rotary embedding
    context: int  # output of attention
    row_statistics: int  # attention's log-sum-exp
    up_gate: int
    product: int
    rstd: int
    logits: int

    @classmethod
    def of(cls, shape: LlamaShape, layout: ParallelLayout, seq_length: int, element: int) -> _Sizes:
        tokens, t = seq_length * layout.micro_batch, layout.tensor
        h, f, kv = shape.hidden_size, shape.intermediate_size, shape.num_kv_heads * shape.head_dim
        share = t if layout.sequence_parallel else 1
        return cls(
            hidden=tokens * h * element // share,
            gathered=tokens * h * element,
            qkv=tokens * (h + 2 * kv) // t * element,
            rotated=tokens * (h + kv) // t * element,
            context=tokens * h // t * element,
            row_statistics=tokens * shape.num_attention_heads // t * FP32,
            up_gate=tokens * 2 * f // t * element,
            product=tokens * f // t * element,
            rstd=tokens * FP32 // share,
            logits=tokens * shape.padded_vocab_size // t * element,
        )

    @property
    def inside_layer(self) -> int:
        """What autograd stores of a layer besides its input."""
        norms = 3 * self.hidden + 2 * self.rstd  # both norms' outputs, the first residual sum
        attention = self.qkv + self.rotated + self.context + self.row_statistics
        return norms + attention + self.up_gate + self.product

    def stored(self, recompute: str) -> int:
        """Bytes that a decoder layer keeps of a micro-batch until its backward pass."""
        if recompute == "full":
            return self.hidden
        dropped = self.rotated + self.row_statistics if recompute == "selective" else 0
        return self.hidden + self.inside_layer - dropped


def _stage(
    shape: LlamaShape,
    layout: ParallelLayout,
    seq_length: int,
    precision: str,
    stage: int,
    layers: range,
    isolate_documents: bool,
) -> StageMemory:
    element = ELEMENT[precision]
    first, last = stage == 0, stage == layout.pipe - 1
    matrices = vectors = largest = 0
    for index in layers:
        for row in _rows(shape, index):
            size = _numel(tensors.rank_shape(row, shape, layout.tensor))
            largest = max(largest, size)
            matrices, vectors = (matrices, vectors + size) if row.shard_dim is None else (matrices + size, vectors)
    parameters = matrices + vectors
    decoders = sum(tensors.decoder_index(0) <= i < tensors.decoder_index(shape.num_layers) for i in layers)
    padded = [_padded(group, 2 * layout.data) for group in (matrices, vectors)]
    sizes = _Sizes.of(shape, layout, seq_length, element)

    in_flight = min(layout.num_micro_batches, layout.pipe - stage)
    if layout.virtual_stages > 1:  # chunks of a stage in flight, in stages (Narayanan et al. 2021, interleaved 1F1B)
        v = layout.virtual_stages
        chunks = 2 * (layout.pipe - stage - 1) + (v - 1) * layout.pipe + 1
        activation_layers = min(chunks, v * layout.num_micro_batches) * decoders / v
    else:
        activation_layers = in_flight * decoders
    received = 0 if first else sizes.hidden  # the engine keeps the received tensor beside the clone it computes with
    kept = received + (0 if last else sizes.hidden)
    activations = int(activation_layers * sizes.stored(layout.recompute)) + in_flight * kept
    if last:
        activations += 2 * sizes.hidden + sizes.rstd

    logits = min(2, layout.num_micro_batches) * sizes.logits + sizes.logits if last else 0
    recomputed = sizes.inside_layer + sizes.hidden if layout.recompute == "full" else 0
    if layout.recompute == "selective":
        recomputed = sizes.rotated + sizes.row_statistics
    largest_in_layer = max(
        (_numel(tensors.rank_shape(row, shape, layout.tensor)) for row in tensors.DECODER_LAYER), default=0
    )
    differentiated = sizes.up_gate + sizes.gathered + largest_in_layer * element
    workspace = recomputed + differentiated if decoders else 0
    table = FP32 * seq_length * shape.head_dim if decoders else 0
    return StageMemory(
        stage=stage,
        layers=layers,
        decoder_layers=decoders,
        parameters=parameters,
        weights=element * sum(padded),
        gradients=(element + FP32) * sum(padded) if precision == "bfloat16" else FP32 * parameters,
        optimizer=3 * FP32 * sum(padded) // layout.data,
        activations=activations,
        workspace=workspace,
        logits=logits,
        pipeline=sizes.hidden if layout.pipe > 1 else 0,
        tables=table,
        communicators=_communicator_bytes(communicators(layout, stage)),
        moment="backward",
    )


def _rows(shape: LlamaShape, index: int) -> tuple[tensors.TensorLayout, ...]:
    if shape.tied and index == tensors.head_index(shape.num_layers):
        return tensors.EMBEDDING
    return tensors.rows_of(index, shape.num_layers)


def _numel(sizes: tuple[int, ...]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _padded(elements: int, multiple: int) -> int:
    return -(-elements // multiple) * multiple
