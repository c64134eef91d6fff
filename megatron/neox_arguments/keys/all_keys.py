"""All groups of keys as one flat class, and their rules, warnings and derivations in a fixed order."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from pydantic import PrivateAttr

from megatron.common.errors import ConfigError
from megatron.layout import LlamaShape, PatchShape, adapted, adapter_alone, padded_vocab_size
from megatron.neox_arguments.keys import (
    checkpoint,
    data,
    embeddings,
    engine,
    evaluation,
    generation,
    lora,
    model,
    optimization,
    parallel,
    patches,
    precision,
    runtime,
    survival,
)
from megatron.neox_arguments.keys.checkpoint import CheckpointKeys
from megatron.neox_arguments.keys.data import DataKeys, unknown_vocabulary
from megatron.neox_arguments.keys.embeddings import EmbeddingKeys
from megatron.neox_arguments.keys.engine import EngineKeys
from megatron.neox_arguments.keys.evaluation import EvaluationKeys
from megatron.neox_arguments.keys.generation import GenerationKeys
from megatron.neox_arguments.keys.lora import LoraKeys
from megatron.neox_arguments.keys.model import ModelKeys
from megatron.neox_arguments.keys.optimization import OptimizationKeys
from megatron.neox_arguments.keys.parallel import ParallelKeys
from megatron.neox_arguments.keys.patches import ModalityKeys
from megatron.neox_arguments.keys.precision import PrecisionKeys
from megatron.neox_arguments.keys.runtime import RuntimeKeys
from megatron.neox_arguments.keys.survival import SurvivalKeys
from megatron.neox_arguments.registry import Registry

# Derivations run in this order, since precision and batch sizes need the device and the number of ranks. Problems are
# reported in the same order, since those of the model or the ranks often explain the rest.
REGISTRY = Registry.joined(
    (
        model.registry,
        patches.registry,
        parallel.registry,
        precision.registry,
        optimization.registry,
        engine.registry,
        data.registry,
        survival.registry,
        checkpoint.registry,
        lora.registry,
        generation.registry,
        runtime.registry,
        evaluation.registry,
        embeddings.registry,
    )
)


# Pydantic lists the fields of the last base first.
class AllKeys(
    SurvivalKeys,
    EmbeddingKeys,
    EvaluationKeys,
    GenerationKeys,
    RuntimeKeys,
    LoraKeys,
    CheckpointKeys,
    DataKeys,
    OptimizationKeys,
    PrecisionKeys,
    EngineKeys,
    ParallelKeys,
    ModalityKeys,
    ModelKeys,
):
    """Every key, what the user gave for them, and the values that follow from keys of several groups."""

    _merged: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def merged(self) -> dict[str, Any]:
        """The keys the user gave, merged, with underscores."""
        return dict(self._merged)

    @cached_property
    def shape(self) -> LlamaShape:
        """Sizes of the model, without its adapter.

        Raises ConfigError if vocab_size comes from a tokenizer that is not on this machine.
        """
        decoder = {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_kv_heads": self.num_kv_heads,
            "intermediate_size": self.intermediate_size,
        }
        if self.patches is not None:
            return PatchShape.of(
                decoder,
                size=self.patches.size,
                channels=self.patches.channels,
                tokenizer=self.patches.tokenizer,
                positions=self.patches.positions,
                max_positions=self.max_position_embeddings,
            )
        if self.vocab_size is None:
            raise ConfigError(unknown_vocabulary(self))
        return LlamaShape(
            **decoder,
            vocab_size=self.vocab_size,
            padded_vocab_size=padded_vocab_size(
                self.vocab_size, self.make_vocab_size_divisible_by, self.model_parallel_size
            ),
            tied=not self.no_weight_tying,
        )

    @cached_property
    def whole_shape(self) -> LlamaShape:
        """`shape` with the adapter's tensors in addition to the base's."""
        if self.lora is None:
            return self.shape
        return adapted(self.shape, self.lora.rank, self.lora.projections)

    @cached_property
    def trained_shape(self) -> LlamaShape:
        """The tensors that a run trains and saves: all, or only the adapter's."""
        if self.lora is None:
            return self.shape
        return adapter_alone(self.shape, self.lora.rank, self.lora.projections)

    @property
    def padded_vocab_size(self) -> int:
        return self.shape.padded_vocab_size

    @property
    def vocabulary_is_known(self) -> bool:
        """Whether `shape` is known here; an image model needs no vocabulary size."""
        return self.vocab_size is not None or self.patches is not None
