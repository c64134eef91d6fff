"""The numbered layers of the decoder as a DeepSpeed pipeline module, one stage per rank."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron import layout
from megatron.engine.nonfinite import poisoned
from megatron.engine.optimizer import mark_sharded, require_training, rows_of_parameters
from megatron.model.documents import as_message, from_message
from megatron.model.initialize import initialize_layers
from megatron.model.llama import TransformerLayer
from megatron.model.lora import freeze_base
from megatron.model.parallel import TensorParallel
from megatron.model.pipeline import PARAMETER_DTYPES, Layer, llama_layers, training_loss
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.place import Place


def connect(args: NeoXArgs, place: Place) -> PipeModelDataParallelTopology:
    """Initialize DeepSpeed's communication within an initialized world; returns its topology of the ranks.

    Pipeline outermost, then data, tensor innermost, as in megatron-core's `tp-dp-pp`. RuntimeError if DeepSpeed assigns
    this rank other coordinates than `place`.
    """
    # DeepSpeed would compile a shared-memory backend for the CPU here, which takes 46 s and fails without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(args.distributed_backend, auto_mpi_discovery=False, verbose=False)
    topology = PipeModelDataParallelTopology(num_pp=place.pp, num_mp=place.tp, num_dp=place.dp)
    coordinate = topology.get_coord(place.rank)
    theirs = (coordinate.pipe, coordinate.data, coordinate.model)
    ours = (place.pp_rank, place.dp_rank, place.tp_rank)
    if ours != theirs:
        raise RuntimeError(f"rank {place.rank} is (pipe, data, tensor) {ours} here and {theirs} for DeepSpeed")
    return topology


class LlamaPipelineModule(PipelineModule):
    """This rank's pipeline stage, with its tensor-parallel shard of every layer.

    Parameters are allocated on `place.device` ("meta" takes no memory) and not initialized. The layout table determines
    which are marked as sharded over tensor-parallel ranks: DeepSpeed's gradient norm counts replicated ones once.
    """

    def __init__(self, args: NeoXArgs, place: Place) -> None:
        topology = connect(args, place)
        self.args, self.place = args, place
        self.tensor_parallel = TensorParallel(
            parallel_state.get_tensor_model_parallel_group(),
            PARAMETER_DTYPES[args.precision],
            args.sequence_parallel,
        )
        # The base class prints its partition.
        with torch.device(place.device), contextlib.redirect_stdout(io.StringIO()):
            super().__init__(
                layers=[_spec(layer) for layer in llama_layers(args, self.tensor_parallel)],
                topology=topology,
                loss_fn=_poisoned_loss(training_loss(args, self.tensor_parallel)),
                partition_method=args.pipe_partition_method,
                activation_checkpoint_interval=1 if args.checkpoint_activations else 0,
                checkpointable_layers=[TransformerLayer.__name__],
            )
        mark_sharded(self.parameter_rows())
        if args.lora is not None:
            freeze_base(self.named_parameters())
            require_training([self.stage_layers(stage) for stage in range(place.pp)], args)

    def to(self, *args: Any, **kwargs: Any) -> LlamaPipelineModule:
        # The base class moves itself to the accelerator at the end of __init__, which meta tensors refuse.
        if next(self.parameters()).is_meta:
            return self
        return super().to(*args, **kwargs)

    def _synchronize_tied_weights(self) -> None:
        # Between tensors without memory there is nothing to send, and torch 2.10 refuses to.
        if self.place.device.type != "meta":
            super()._synchronize_tied_weights()

    def forward(self, message: Any) -> Any:
        """Run a micro-batch through the stage. Document boundaries are read from the device here, once for all layers,
        and passed on as an object: tensors would be new ones in every layer that DeepSpeed recomputes."""
        return as_message(super().forward(from_message(message)))

    def _is_checkpointable(self, funcs: list[Any]) -> bool:
        """Whether a layer is recomputed; DeepSpeed calls it for each layer.

        The first `recompute_layers` decoder layers of the stage are: their backward passes come last, when the other
        layers have already freed their activations.
        """
        if not super()._is_checkpointable(funcs):
            return False
        decoder = [layer for layer in self.forward_funcs if isinstance(layer, TransformerLayer)]
        return funcs[0] in decoder[: self.args.recompute_layers]

    def numbered_layers(self) -> Iterator[tuple[int, nn.Module]]:
        """(layer file number, module) of every layer with parameters that this stage owns.

        The last stage's copy of a tied embedding has no file of its own: it mirrors the first stage's.
        """
        for offset, layer in enumerate(self.forward_funcs):
            if isinstance(layer, nn.Module):
                yield self._local_start + offset, layer

    def tied_copies(self) -> Iterator[tuple[int, nn.Module]]:
        """(number of the file that holds it, module) of a tied embedding that another stage owns."""
        own = {id(layer) for _, layer in self.numbered_layers()}
        for tied in self.tied_modules.values():
            if id(tied) not in own:
                yield layout.EMBEDDING_INDEX, tied

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
        """The tied weights whose gradients DeepSpeed sums; frozen weights have none."""
        return [(weight, group) for weight, group in super().get_tied_weights_and_groups() if weight.requires_grad]

    def tied_group(self) -> Any:
        """The ranks that hold a tied embedding; None without one."""
        return next((group for _, group in super().get_tied_weights_and_groups()), None)

    def parameter_rows(self) -> list[tuple[nn.Parameter, layout.TensorRow]]:
        """Every parameter of this rank with its row of the layout table."""
        return rows_of_parameters([*self.numbered_layers(), *self.tied_copies()], self.args.whole_shape)

    def load_state_dir(self, load_dir: str, checkpoint_engine: Any, strict: bool = True) -> None:
        """Refused: if a shard is missing, DeepSpeed's loader silently gives a rank another rank's shard."""
        raise NotImplementedError("layer files are read by megatron.checkpoint.load, not by the engine")

    def stage_layers(self, stage: int, virtual: int = 0) -> range:
        """Layer numbers of a stage; with DeepSpeed a stage is one contiguous run."""
        return range(self.parts[stage], self.parts[stage + 1])

    def initialize_weights(self) -> None:
        """Initialize all weights; the same model for every TP x PP x DP split."""
        initialize_layers(self.numbered_layers(), self.args, self.tensor_parallel.size, self.tensor_parallel.rank)
        self.synchronize_tied()

    def synchronize_tied(self) -> None:
        """Copy the first stage's tied embedding to the last stage. Collective."""
        self._synchronize_tied_weights()


def _poisoned_loss(loss_of: Callable[[Tensor, Any], Tensor]) -> Callable[[Tensor, Any], Tensor]:
    """`loss_of`, with NaN gradients if a training loss is not finite."""

    def loss_fn(outputs: Tensor, targets: Any) -> Tensor:
        loss = loss_of(outputs, targets)
        return poisoned(loss) if loss.requires_grad else loss

    return loss_fn


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
