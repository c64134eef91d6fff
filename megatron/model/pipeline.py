"""The decoder as a list of numbered layers, and that list as a DeepSpeed pipeline.

`llama_layers` knows the model and no engine; `LlamaPipelineModule` is its first consumer. Layer numbers are the
checkpoint's: 0 embedding, 1 and L+2 transposes, 2..L+1 decoder layers, L+3 norm, L+4 head.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron.model.initialize import initialise
from megatron.model.llama import Embedding, FinalNorm, Head, TransformerLayer, batch_first, sequence_first
from megatron.model.loss import GlobalMeanLoss
from megatron.model.parallel import TensorParallel
from megatron.model.rotary import RotaryTable
from megatron.neox_arguments import NeoXArgs

PARAMETER_DTYPES = {"fp32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Layer:
    """One step of the decoder: a module class to build, or a function without parameters."""

    build: type[nn.Module] | None
    arguments: tuple[Any, ...] = ()
    function: Callable[..., Any] | None = None  # applied to the input, or for `shares` to (module, input)
    shares: str | None = None  # layers with the same key hold one module


def llama_layers(args: NeoXArgs, tp: TensorParallel) -> list[Layer]:
    """The whole model in order; position in the list is the layer's number in the checkpoint."""
    rotary = RotaryTable(args.head_dim, args.rotary_emb_base, args.rope_scaling, args.seq_length)
    tied = None if args.no_weight_tying else "embedding"
    return [
        Layer(Embedding, (args, tp), shares=tied),
        Layer(None, function=sequence_first),
        *(Layer(TransformerLayer, (args, tp, rotary)) for _ in range(args.num_layers)),
        Layer(None, function=batch_first),
        Layer(FinalNorm, (args, tp)),
        Layer(Embedding, (args, tp), function=partial(_tied_head, tp), shares=tied)
        if tied
        else Layer(Head, (args, tp)),
    ]


def _tied_head(tp: TensorParallel, embedding: Embedding, x: Tensor) -> Tensor:
    return tp.tied_logits(x, embedding.word_embeddings)


def topology(args: NeoXArgs) -> PipeModelDataParallelTopology:
    """Rank order: pipeline outermost, then data, tensor innermost, as in megatron-core's `tp-dp-pp`."""
    return PipeModelDataParallelTopology(
        num_pp=args.pipe_parallel_size, num_mp=args.model_parallel_size, num_dp=args.data_parallel_size
    )


class LlamaPipelineModule(PipelineModule):
    """This rank's pipeline stage, with its tensor-parallel part of every layer.

    Parameters are allocated on `device` (torch's "meta" plans without memory) and not initialised: fill them with
    `initialise_from_scratch` or from a checkpoint.
    """

    def __init__(self, args: NeoXArgs, tp: TensorParallel, device: torch.device) -> None:
        self.args = args
        self.tensor_parallel = tp
        with torch.device(device), contextlib.redirect_stdout(io.StringIO()):  # the base class prints its partition
            super().__init__(
                layers=[_spec(layer) for layer in llama_layers(args, tp)],
                topology=topology(args),
                loss_fn=GlobalMeanLoss(tp.group, args.vocab_size),
                partition_method=args.pipe_partition_method,
                activation_checkpoint_interval=1 if args.checkpoint_activations else 0,
                checkpointable_layers=[TransformerLayer.__name__],
            )

    def to(self, *args: Any, **kwargs: Any) -> LlamaPipelineModule:
        # The base class moves itself to the accelerator at the end of __init__, which meta tensors refuse.
        if next(self.parameters()).is_meta:
            return self
        return super().to(*args, **kwargs)

    def _is_checkpointable(self, funcs: list[Any]) -> bool:
        """DeepSpeed's question, layer by layer: is this one recomputed?

        The first `recompute_layers` decoder layers of the stage are. Their backward passes come last, when the layers
        that are stored have given their memory back.
        """
        if not super()._is_checkpointable(funcs):
            return False
        decoder = [layer for layer in self.forward_funcs if isinstance(layer, TransformerLayer)]
        return funcs[0] in decoder[: self.args.recompute_layers]

    def numbered_layers(self) -> Iterator[tuple[int, nn.Module]]:
        """(layer file number, module) of every layer with parameters that this stage owns.

        The last stage's copy of a tied embedding has no file of its own: it follows the first stage's.
        """
        for offset, layer in enumerate(self.forward_funcs):
            if isinstance(layer, nn.Module):
                yield self._local_start + offset, layer

    def load_state_dir(self, load_dir: str, checkpoint_engine: Any, strict: bool = True) -> None:
        """Refused: DeepSpeed's loader gives a rank another rank's shard where one is missing, without a word."""
        raise NotImplementedError("layer files are read by megatron.checkpoint.load_checkpoint, not by the engine")

    def stage_layers(self, stage: int) -> range:
        """Layer numbers of a stage."""
        return range(self.parts[stage], self.parts[stage + 1])

    def initialise_from_scratch(self) -> None:
        """Draw all weights; the same model for every TP x PP x DP split."""
        initialise(self.numbered_layers(), self.args, self.tensor_parallel.size, self.tensor_parallel.rank)
        self._synchronize_tied_weights()


def _spec(layer: Layer) -> Any:
    if layer.shares is not None:
        return TiedLayerSpec(
            layer.shares,
            layer.build,
            *layer.arguments,
            forward_fn=layer.function,
            tied_weight_attr=["word_embeddings.weight"],
        )
    if layer.build is None:
        return layer.function
    return LayerSpec(layer.build, *layer.arguments)
