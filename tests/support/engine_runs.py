"""Engine runs for tests: fixed samples with uneven masks through the real engine, at any TP x PP x DP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron import layout
from megatron.neox_arguments import NeoXArgs
from tests.support.models import Case, load_hugging_face, start

IGNORE = -100


class Samples(list):
    """Samples as the trainer reads a dataset: by number, and one that teaches nothing."""

    def padding(self) -> dict[str, Tensor]:
        return {**self[0], "labels": torch.full_like(self[0]["labels"], IGNORE)}


def make_samples(case: Case, count: int, seed: int = 7) -> list[dict[str, Tensor]]:
    """`count` random samples; sample i has a share of its labels masked that grows with i mod 4 (none to 90 %)."""
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


def build(args: NeoXArgs, case: Case, seed: int = 0, device: torch.device | None = None) -> Any:
    """The engine on this rank, on the CPU unless told, with the case's random HF weights."""
    from megatron.engine.deepspeed import build_engine, build_model

    cpu = start(args)
    model = build_model(args, device or cpu)
    state = dict(case.hugging_face(seed).state_dict())
    load_hugging_face(model, state, args)
    return build_engine(args, model, log=lambda line: None)


def step(engine: Any, args: NeoXArgs, samples: list[dict[str, Tensor]], iteration: int = 0) -> tuple[float, float]:
    """One optimizer step on one global batch: (loss, gradient norm)."""
    from megatron.trainer.learning_rate import learning_rate

    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(args, iteration)
    loss = float(engine.train_batch(batch_of(engine, args, samples).iterator))
    return loss, float(engine.get_global_grad_norm())


def batch_of(engine: Any, args: NeoXArgs, samples: list[dict[str, Tensor]]) -> Any:
    from megatron.trainer.batches import assemble

    micro, dp = args.train_micro_batch_size_per_gpu, args.data_parallel_size
    reads = engine.is_first_stage() or engine.is_last_stage()
    micro_batches = rank_micro_batches(samples, micro, engine.grid.data_parallel_id, dp) if reads else None
    return assemble(
        micro_batches,
        len(samples) // (micro * dp),
        dp,
        counts_tokens=engine.is_last_stage() and engine.grid.get_slice_parallel_rank() == 0,
        device=engine.device,
        what="test",
    )


@dataclass
class RankParameters:
    """One rank's parameters by (layer file, tensor name), and where the rank stands."""

    tp_rank: int
    dp_rank: int
    tensors: dict[tuple[int, str], Tensor]


def rank_parameters(engine: Any) -> RankParameters:
    return RankParameters(
        engine.grid.get_slice_parallel_rank(),
        engine.grid.data_parallel_id,
        {
            (index, name): parameter.detach().clone()
            for index, layer in engine.module.numbered_layers()
            for name, parameter in layer.named_parameters()
        },
    )


def whole_model(ranks: list[RankParameters], args: NeoXArgs) -> dict[str, Tensor]:
    """HF-shaped tensors from all ranks' parts.

    Asserts on the way that data-parallel replicas and replicated tensors are bit-equal.
    """
    tp = args.model_parallel_size
    parts: dict[tuple[int, str], dict[int, Tensor]] = {}
    for rank in ranks:
        for key, tensor in rank.tensors.items():
            known = parts.setdefault(key, {}).setdefault(rank.tp_rank, tensor)
            assert torch.equal(known, tensor), f"{key}: data-parallel replicas differ"
    whole: dict[str, Tensor] = {}
    for (index, name), by_rank in parts.items():
        row = layout.row_of(index, name, args.shape)
        names = [n.format(layer=index - 2) for n in row.hf]
        if row.replicated:
            for tp_rank in range(tp):
                assert torch.equal(by_rank[0], by_rank[tp_rank]), f"{key_text(index, name)}: replicas differ over TP"
            whole[names[0]] = by_rank[0]
            continue
        sources = [torch.empty(shape, dtype=by_rank[0].dtype) for shape in layout.source_shapes(row, args.shape)]
        for tp_rank in range(tp):
            offset = 0
            for piece in layout.rank_slices(row, args.shape, tp, tp_rank):
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
