"""How a model is split over ranks and a batch into micro-batches: the input of all of the planner's formulas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from megatron.neox_arguments import NeoXArgs

Recompute = Literal["none", "selective", "full"]
EngineName = Literal["deepspeed", "megatron"]


def decoders_by_stage(num_layers: int, pipe: int) -> list[int]:
    """Decoder layers of each stage, or of each virtual stage: distributed evenly, the longer ones first, as in
    DeepSpeed with `type:transformer|mlp`."""
    return [num_layers // pipe + (stage < num_layers % pipe) for stage in range(pipe)]


@dataclass(frozen=True)
class ParallelLayout:
    """One way to run a model on `world_size` ranks.

    `recompute` is what the backward pass recomputes: nothing, everything except matrix products (selective), or decoder
    layers (full), `recompute_layers` of each stage or all of them. The fields after `engine`, and selective
    recomputation, apply only to megatron-core.
    """

    tensor: int
    pipe: int
    data: int
    micro_batch: int
    num_micro_batches: int  # gradient accumulation steps
    recompute: Recompute = "full"
    recompute_layers: int | None = None  # of each stage, with full recomputation; None: all
    sequence_parallel: bool = False
    engine: EngineName = "deepspeed"
    virtual_stages: int = 1  # runs of layers on each rank
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False

    @classmethod
    def of(cls, args: NeoXArgs) -> ParallelLayout:
        """The layout of a resolved training configuration."""
        return cls(
            tensor=args.model_parallel_size,
            pipe=args.pipe_parallel_size,
            data=args.data_parallel_size,
            micro_batch=args.train_micro_batch_size_per_gpu,
            num_micro_batches=args.gradient_accumulation_steps,
            recompute=args.recompute,
            recompute_layers=args.recompute_layers,
            sequence_parallel=args.sequence_parallel,
            engine=args.engine,
            virtual_stages=args.virtual_pipe_parallel_size,
            overlap_grad_reduce=bool(args.overlap_grad_reduce),
            overlap_param_gather=bool(args.overlap_param_gather),
        )

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipe * self.data

    @property
    def global_batch(self) -> int:
        """Sequences of one optimizer step."""
        return self.micro_batch * self.num_micro_batches * self.data

    def recomputed(self, decoder_layers: int) -> int:
        """How many of a stage's decoder layers the backward pass recomputes."""
        if self.recompute != "full":
            return 0
        return decoder_layers if self.recompute_layers is None else min(self.recompute_layers, decoder_layers)
