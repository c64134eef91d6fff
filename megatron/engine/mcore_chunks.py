"""The runs of numbered layers that a rank holds under engine: megatron, one for each virtual stage."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron import layout
from megatron.engine.batches import sequence
from megatron.model.documents import Documents
from megatron.model.llama import TransformerLayer
from megatron.model.parallel import TensorParallel
from megatron.model.pipeline import Layer, llama_layers
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.place import Place


def runs_of_layers(num_layers: int, pieces: int) -> list[range]:
    """Split the model into `pieces` runs; returns the layer file numbers of each, in order.

    Decoder layers are distributed evenly, the longer runs first; the layers before them are in the first run, those
    after them in the last.
    """
    sizes = [num_layers // pieces + (piece < num_layers % pieces) for piece in range(pieces)]
    edges = [0] + [2 + sum(sizes[: piece + 1]) for piece in range(pieces)]
    edges[-1] = num_layers + 5
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]


class Chunk(nn.Module):
    """A run of layers. Its forward takes a micro-batch, and the hidden states set by `set_input_tensor`.

    `recompute` has the numbers of the layers that the backward pass recomputes. The other public names are read by
    megatron-core: `pre_process` and `post_process` say whether this is the model's first and last run.
    """

    def __init__(
        self,
        args: NeoXArgs,
        layers: Mapping[int, Layer],
        config: TransformerConfig,
        virtual_stage: int | None,
        recompute: frozenset[int],
    ) -> None:
        super().__init__()
        self.config, self.vp_stage, self.recompute = config, virtual_stage, recompute
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = layout.EMBEDDING_INDEX in layers
        self.last_number = args.num_layers + 4
        self.post_process = self.last_number in layers
        self.share_embeddings_and_output_weights = args.shape.tied and args.lora is None  # sum the tied gradients
        self.held = nn.ModuleDict()
        self.before_tied_head: Callable[[], None] = lambda: None
        self._steps: list[tuple[int, Any]] = []
        self._last_with_documents = args.num_layers + 2
        self._input: Tensor | None = None
        for number, layer in layers.items():
            self._steps.append((number, self._step(number, layer)))

    def _step(self, number: int, layer: Layer) -> Any:
        """Layer `number` as a callable; modules are registered under the number of the file that has their weights."""
        if layer.build is None:
            return layer.function
        if layer.shares is None or layer.function is None:
            self.held[str(number)] = module = layer.build(*layer.arguments)
            return module
        owner = str(layout.EMBEDDING_INDEX)
        if owner not in self.held:  # a copy of another rank's embedding
            self.held[owner] = layer.build(*layer.arguments)
        function, shared = layer.function, self.held[owner]

        def apply(hidden: Tensor) -> Tensor:
            self.before_tied_head()  # the head reads the matrix directly, bypassing its module's hooks
            output: Tensor = function(shared, hidden)
            return output

        return apply

    def forward(self, micro_batch: Mapping[str, Tensor], documents: Documents | None) -> Tensor:
        """Hidden states [s, b, h]; in the model's last run, this rank's logits [b, s, V / tp]."""
        stream: Any = sequence(micro_batch) if self.pre_process else self._input
        if documents is not None and self._steps[0][0] <= self._last_with_documents:
            stream = (stream, documents)
        again = self.recompute if torch.is_grad_enabled() else frozenset[int]()
        for number, step in self._steps:
            if number in again:
                stream = checkpoint(step, stream, use_reentrant=False, preserve_rng_state=False)
            else:
                stream = step(stream)
        self._input = None
        output: Tensor = stream[0] if isinstance(stream, tuple) else stream
        return output

    def callables(self) -> list[Any]:
        """Modules and functions in order, for a forward pass outside the schedule."""
        return [step for _, step in self._steps]

    def set_input_tensor(self, tensors: Any) -> None:
        self._input = tensors[0] if isinstance(tensors, list) else tensors

    def shared_embedding_or_output_weight(self) -> nn.Parameter:
        weight: nn.Parameter = self.held[str(layout.EMBEDDING_INDEX)].word_embeddings.weight  # type: ignore[union-attr,assignment]
        return weight

    @property
    def holds_a_copy(self) -> bool:
        """Whether it holds a tied copy of another rank's embedding."""
        return not self.pre_process and str(layout.EMBEDDING_INDEX) in self.held

    def numbered(self) -> Iterator[tuple[int, nn.Module]]:
        """(layer file number, module) of the layers that have a file of their own here."""
        for name, module in self.held.items():
            if not (self.holds_a_copy and int(name) == layout.EMBEDDING_INDEX):
                yield int(name), module


class ChunkedStage:
    """This rank's part of the model as a `PipelineStage`, on `place.device` and not initialized.

    With `virtual` stages per rank, rank p of P has the runs p, p + P, p + 2P, ... of the model.
    """

    def __init__(self, args: NeoXArgs, place: Place, tp: TensorParallel, config: Any, virtual: int) -> None:
        self.args, self.place, self.virtual = args, place, virtual
        self._runs = runs_of_layers(args.num_layers, place.pp * virtual)
        layers = llama_layers(args, tp)
        own = [self.stage_layers(place.pp_rank, number) for number in range(virtual)]
        decoder = [number for run in own for number in run if layers[number].build is TransformerLayer]
        recompute = frozenset(decoder[: args.recompute_layers] if args.recompute == "full" else [])
        with torch.device(place.device):
            self.chunks = [
                Chunk(
                    args,
                    {number: layers[number] for number in run},
                    config,
                    virtual_stage if virtual > 1 else None,
                    recompute,
                )
                for virtual_stage, run in enumerate(own)
            ]

    def numbered_layers(self) -> Iterator[tuple[int, nn.Module]]:
        for chunk in self.chunks:
            yield from chunk.numbered()

    def tied_copies(self) -> Iterator[tuple[int, nn.Module]]:
        for chunk in self.chunks:
            if chunk.holds_a_copy:
                yield layout.EMBEDDING_INDEX, chunk.held[str(layout.EMBEDDING_INDEX)]

    def stage_layers(self, stage: int, virtual: int = 0) -> range:
        return self._runs[stage + virtual * self.place.pp]
