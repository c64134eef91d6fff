"""Engine runs for tests: fixed samples with uneven masks through the real engine, at any TP x PP x DP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron import layout
from megatron.checkpoint.load import load_checkpoint
from megatron.checkpoint.start import find_start
from megatron.checkpoint.state import TrainState
from megatron.engine.batches import StepBatch, assemble_step
from megatron.engine.build import build_engine, build_inference_engine
from megatron.engine.protocol import Around, Engine, no_phases
from megatron.neox_arguments import NeoXArgs
from megatron.parallel.collective_errors import RankGroup
from megatron.trainer.schedule import Schedule
from tests.support.models import Case, gathered, load_hugging_face
from tests.support.patch_models import PatchCase

IGNORE = -100


class Samples(list):
    """Samples with the interface of the trainer's datasets: by number, and padding without labels."""

    def padding(self) -> dict[str, Tensor]:
        return {**self[0], "labels": torch.full_like(self[0]["labels"], IGNORE)}


def make_samples(case: Case, count: int, seed: int = 7) -> list[dict[str, Tensor]]:
    """`count` random samples; the masked fraction of sample i's labels grows with i mod 4 (none to 90 %)."""
    if isinstance(case, PatchCase):
        return case.samples(count, seed)
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(count):
        tokens = torch.randint(case.vocab, (case.seq + 1,), generator=generator)
        labels = tokens[1:].clone()
        masked = torch.rand(case.seq, generator=generator) < (index % 4) * 0.3
        labels[masked] = IGNORE
        samples.append({"tokens": tokens[:-1], "labels": labels})
    return samples


def stack(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def rank_micro_batches(samples: list[dict[str, Tensor]], micro: int, dp_rank: int, dp_size: int) -> list[Any]:
    """This data-parallel rank's micro-batches of one global batch."""
    return [
        stack(samples[start + dp_rank * micro : start + (dp_rank + 1) * micro])
        for start in range(0, len(samples), micro * dp_size)
    ]


def build(args: NeoXArgs, case: Case, seed: int = 0, around: Around = no_phases, device: str = "cpu") -> Engine:
    """The engine on this rank, by default on the CPU, with the case's random HF weights."""
    from megatron.parallel.process_groups import form_groups

    engine = build_engine(args, form_groups(args, torch.device(device)), around)
    load_hugging_face(engine, dict(case.hugging_face(seed).state_dict()), args)
    return engine


def load(engine: Engine, args: NeoXArgs, data_fingerprints: dict[str, str] | None = None) -> TrainState:
    """Load `args.load` as a run does: find the starting point, and fill the engine."""
    start = find_start(RankGroup.world(engine.place.device), args)
    return load_checkpoint(engine, args, start, data_fingerprints=data_fingerprints)


def inference(args: NeoXArgs, state: dict[str, Tensor]) -> Engine:
    """An engine without optimizer on this rank, on the CPU, with whole HF weights."""
    from megatron.parallel.process_groups import form_groups

    engine = build_inference_engine(args, form_groups(args))
    load_hugging_face(engine, state, args)
    return engine


def whole_logits(engine: Engine, args: NeoXArgs, ids: Tensor, positions: Tensor | None = None) -> Tensor | None:
    """Logits [b, s, vocab_size] on the last stage, None on the others."""
    local = engine.logits(ids, positions)
    return None if local is None else gathered(local, engine.groups.tensor)[..., : args.vocab_size]


def step(engine: Engine, args: NeoXArgs, samples: list[dict[str, Tensor]], iteration: int = 0) -> tuple[float, float]:
    """One optimizer step on one global batch: (loss, gradient norm)."""
    engine.set_learning_rate(Schedule(args, args.train_iters or 0).learning_rate(iteration))
    result = engine.train_step(batch_of(engine, args, samples))
    return result.loss, result.grad_norm


def batch_of(engine: Engine, args: NeoXArgs, samples: list[dict[str, Tensor]]) -> StepBatch:
    """This rank's part of a global batch of `samples`."""
    place, micro = engine.place, args.train_micro_batch_size_per_gpu
    micro_batches = rank_micro_batches(samples, micro, place.dp_rank, place.dp) if place.reads_data else None
    return assemble_step(micro_batches, len(samples) // (micro * place.dp), place, "test")


@dataclass
class RankParameters:
    """One rank's parameters by (layer file, tensor name), and the rank's place."""

    tp_rank: int
    dp_rank: int
    tensors: dict[tuple[int, str], Tensor]


def rank_parameters(engine: Engine) -> RankParameters:
    return RankParameters(
        engine.place.tp_rank,
        engine.place.dp_rank,
        {
            (index, name): parameter.detach().clone()
            for index, layer in engine.numbered_layers()
            for name, parameter in layer.named_parameters()
        },
    )


def whole_model(ranks: list[RankParameters], args: NeoXArgs) -> dict[str, Tensor]:
    """HF tensors assembled from all ranks; asserts that data-parallel replicas and replicated tensors are bit-equal."""
    tp = args.model_parallel_size
    parts: dict[tuple[int, str], dict[int, Tensor]] = {}
    for rank in ranks:
        for key, tensor in rank.tensors.items():
            known = parts.setdefault(key, {}).setdefault(rank.tp_rank, tensor)
            assert torch.equal(known, tensor), f"{key}: data-parallel replicas differ"
    whole: dict[str, Tensor] = {}
    for (index, name), by_rank in parts.items():
        row = layout.row_of(index, name, args.whole_shape)
        names = [n.format(layer=index - 2) for n in row.hf]
        if row.replicated:
            for tp_rank in range(tp):
                assert torch.equal(by_rank[0], by_rank[tp_rank]), f"{key_text(index, name)}: replicas differ over TP"
            whole[names[0]] = by_rank[0]
            continue
        sources = [torch.empty(shape, dtype=by_rank[0].dtype) for shape in layout.source_shapes(row, args.whole_shape)]
        for tp_rank in range(tp):
            offset = 0
            for piece in layout.rank_slices(row, args.whole_shape, tp, tp_rank):
                if piece.source is not None:
                    target = sources[piece.source].narrow(row.shard_dim, piece.start, len(piece))
                    target.copy_(by_rank[tp_rank].narrow(row.shard_dim, offset, len(piece)))
                offset += len(piece)
        whole.update(zip(names, sources, strict=True))
    return whole


def key_text(index: int, name: str) -> str:
    return f"layer {index} {name}"


def relative_difference(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||; element-wise relative differences say nothing near zero."""
    return float((a.double() - b.double()).norm() / b.double().norm())
