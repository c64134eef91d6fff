"""The planner's memory model compared with the real engine: predicted and measured peak bytes in a training step.

    python benchmarks/planner_memory.py [--device cuda|cpu] [--json FILE] [--write docs/planning.md]

On a CPU, a dispatch mode counts every live storage, on forked gloo ranks in several layouts (TP, PP, DP, micro-batch,
recomputation, precision, tied, isolated documents). On a GPU, with one rank, `torch.cuda.max_memory_allocated` gives
it, for models of several sizes. Both run the trainer's engine for four steps and use the third and fourth. Needs what a
training run needs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.ranks import run_ranks_forked  # noqa: E402
from examples.llama_keys import LLAMA  # noqa: E402
from megatron.neox_arguments import NeoXArgs  # noqa: E402
from megatron.planner.cost.memory import StageMemory, plan_memory  # noqa: E402
from megatron.planner.cost.parallel_layout import ParallelLayout  # noqa: E402

if TYPE_CHECKING:
    from megatron.engine.batches import StepBatch
    from megatron.parallel.place import Place
    from megatron.planner.cost.activations import Ops

MIB = 1 << 20
MARKERS = {"cpu": "memory", "cuda": "memory-gpu"}  # markers of the page, by device
STEPS = 4


@dataclass(frozen=True)
class Case:
    """A model and a layout; `recompute` whole layers, `recompute_layers` of each stage (None: all)."""

    tensor: int = 1
    pipe: int = 1
    data: int = 1
    micro_batch: int = 1
    num_micro_batches: int = 4
    recompute: bool = True
    recompute_layers: int | None = None
    precision: str = "bfloat16"
    layers: int = 4
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 2
    intermediate: int = 704
    vocab: int = 1024
    seq: int = 256
    tied: bool = False
    documents: bool = False
    bucket: int | None = None  # elements; with contiguous_gradients
    sequence_parallel: bool = False
    engine: str = "deepspeed"
    virtual: int = 1
    selective: bool = False  # recompute everything except matrix products
    lora: int | None = None  # rank of an adapter for all projections; the rest is frozen
    patch: int = 0  # side of the patches of an image model, with three bands
    affine: bool = False

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipe * self.data

    @property
    def model(self) -> str:
        flags = (("tied", self.tied), ("documents", self.documents), (f"bucket {self.bucket or 0:,}", self.bucket))
        flags += ((f"LoRA {self.lora}", self.lora),)
        extra = [word for word, is_so in flags if is_so]
        if self.patch:
            ends = f"patches {self.patch} x {self.patch} x 3 {'affine' if self.affine else 'mlp'}"
        else:
            ends = f"V {self.vocab:,}"
        return " ".join([f"{self.layers} x {self.hidden}, {ends}, s {self.seq:,}", *extra])

    @property
    def layout(self) -> str:
        recompute = "recomputed" if self.recompute else "selective" if self.selective else "stored"
        if self.recompute_layers is not None:
            recompute = f"{self.recompute_layers} recomputed"
        tensor = f"TP{self.tensor} SP" if self.sequence_parallel else f"TP{self.tensor}"
        pipe = f"PP{self.pipe}" + (f" v{self.virtual}" if self.virtual > 1 else "")
        return (
            f"{tensor} {pipe} DP{self.data}, {self.micro_batch} x {self.num_micro_batches}, {recompute}, "
            f"{'bf16' if self.precision == 'bfloat16' else self.precision}"
            f"{', megatron' if self.engine == 'megatron' else ''}"
        )

    def _ends(self) -> dict[str, Any]:
        """Keys for the model's input and output."""
        if not self.patch:
            return {
                "vocab_size": self.vocab,
                "make_vocab_size_divisible_by": 1,
                "no_weight_tying": not self.tied,
                "isolate_documents": self.documents,
            }
        tokenizer = "affine" if self.affine else "mlp"
        return {"modality": "patches", "patches": {"size": self.patch, "normalise": "patch", "tokenizer": tokenizer}}

    def args(self, device: str) -> NeoXArgs:
        zero: dict[str, Any] = {} if self.engine == "megatron" else {"zero_optimization": {"stage": 1}}
        if self.bucket:
            zero["zero_optimization"] |= {"contiguous_gradients": True, "reduce_bucket_size": self.bucket}
        return NeoXArgs.from_dict(
            {
                "num_layers": self.layers,
                "hidden_size": self.hidden,
                "num_attention_heads": self.heads,
                "num_kv_heads": self.kv_heads,
                "intermediate_size": self.intermediate,
                **LLAMA,
                **self._ends(),
                "seq_length": self.seq,
                "max_position_embeddings": self.seq,
                "rotary_emb_base": 500000,
                "rms_norm_epsilon": 1e-5,
                "model_parallel_size": self.tensor,
                "sequence_parallel": self.sequence_parallel,
                "pipe_parallel_size": self.pipe,
                "train_micro_batch_size_per_gpu": self.micro_batch,
                "gradient_accumulation_steps": self.num_micro_batches,
                "checkpoint_activations": self.recompute,
                "recompute_layers": self.recompute_layers,
                "precision": self.precision,
                **zero,
                "engine": self.engine,
                "virtual_pipe_parallel_size": self.virtual,
                **({"recompute": "selective"} if self.selective else {}),
                "train_iters": STEPS,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8}},
                "distributed_backend": "gloo" if device == "cpu" else "nccl",
                **({} if self.lora is None else {"lora": {"rank": self.lora, "alpha": self.lora}}),
                **({"from_scratch": True} if self.lora is None else {"load": "unused"}),
                "train_data_paths": ["unused"],
            },
            world_size=self.world_size,
        )


CPU_CASES = (
    Case(),
    Case(recompute=False),
    Case(precision="fp32"),
    Case(precision="fp32", recompute=False),
    Case(num_micro_batches=1, micro_batch=2, recompute=False),
    Case(pipe=2),
    Case(pipe=2, recompute=False, micro_batch=2),
    Case(pipe=2, precision="fp32", recompute=False),
    Case(pipe=2, layers=5, num_micro_batches=2, recompute=False),
    Case(tensor=2, micro_batch=2),
    Case(tensor=2, recompute=False),
    Case(data=2, seq=512),
    Case(data=2, precision="fp32"),
    Case(tensor=2, pipe=2, micro_batch=2),
    Case(tensor=2, pipe=2, micro_batch=2, recompute=False, precision="fp32"),
    Case(pipe=2, data=2, tied=True),
    Case(pipe=2, documents=True, recompute=False),
    Case(tensor=2, pipe=2, data=2, seq=512),
    Case(pipe=2, num_micro_batches=3, micro_batch=2, seq=1024, recompute=False),
    Case(pipe=2, num_micro_batches=3, micro_batch=2, seq=2048, layers=8, hidden=128, intermediate=352),
    Case(
        pipe=2, num_micro_batches=3, micro_batch=2, seq=1024, layers=8, hidden=128, intermediate=352, recompute_layers=1
    ),
    Case(tensor=2, micro_batch=2, seq=1024, precision="fp32", recompute=False),
    Case(tensor=2, micro_batch=2, seq=1024, precision="fp32", recompute=False, sequence_parallel=True),
    Case(tensor=2, recompute=False, sequence_parallel=True),
    Case(tensor=4, kv_heads=4, seq=1024, sequence_parallel=True),
    Case(tensor=2, pipe=2, micro_batch=2, seq=512, sequence_parallel=True),
    Case(tensor=2, pipe=2, seq=1024, recompute=False, precision="fp32", sequence_parallel=True),
    Case(tensor=2, pipe=2, data=2, seq=512, tied=True, documents=True, recompute=False, sequence_parallel=True),
    Case(recompute=False, precision="fp32", engine="megatron"),
    Case(data=2, recompute=False, engine="megatron"),
    Case(pipe=2, recompute=False, engine="megatron"),
    Case(pipe=2, virtual=2, recompute=False, engine="megatron"),
    Case(pipe=2, virtual=2, num_micro_batches=16, recompute=False, engine="megatron"),
    Case(pipe=2, virtual=2, layers=8, recompute_layers=3, engine="megatron"),
    Case(pipe=2, virtual=2, recompute=False, selective=True, engine="megatron"),
    Case(tensor=2, pipe=2, virtual=2, data=2, seq=512, recompute=False, sequence_parallel=True, engine="megatron"),
    Case(pipe=4, virtual=2, layers=8, tied=True, documents=True, recompute=False, engine="megatron"),
    Case(lora=16, recompute=False),
    Case(lora=16, pipe=2, micro_batch=2),
    Case(lora=16, tensor=2, pipe=2, data=2, seq=512, sequence_parallel=True),
)
_LLAMA = {"kv_heads": 8, "num_micro_batches": 2}
GPU_CASES = (
    Case(**_LLAMA, layers=8, hidden=2048, heads=32, intermediate=8192, vocab=128256, seq=4096, tied=True),
    Case(**_LLAMA, layers=8, hidden=2048, heads=32, intermediate=8192, vocab=32000, seq=4096, recompute=False),
    Case(**_LLAMA, layers=4, hidden=4096, heads=32, intermediate=14336, vocab=32000, seq=8192, recompute=False),
    Case(**_LLAMA, layers=6, hidden=4096, heads=32, intermediate=14336, vocab=128256, seq=8192),
    Case(**_LLAMA, layers=2, hidden=8192, heads=64, intermediate=28672, vocab=32000, seq=8192),
    Case(**_LLAMA, layers=12, hidden=1024, heads=16, intermediate=2816, vocab=32000, seq=4096, micro_batch=4),
)


@dataclass(frozen=True)
class Measured:
    """Peak bytes of one rank; `moments` are the peaks of each phase of a step."""

    stage: int
    peak: int
    moments: dict[str, int]
    ops: Ops


def measure(rank: int, world_size: int, case: Case, device: str = "cpu") -> Measured:
    """Peak tensor bytes of a training step of `case` on this rank; needs an initialized world."""
    import torch
    from megatron.core import parallel_state

    from megatron.engine.build import build_engine
    from megatron.ops.library import use_kernels
    from megatron.parallel.process_groups import form_groups

    args = case.args(device)
    with _counter(device) as counter:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        moments: Counter[str] = Counter()

        @contextmanager
        def watched(phase: str) -> Iterator[None]:
            counter.reset()
            yield
            moments[phase] = max(moments[phase], counter.peak())

        engine = build_engine(args, form_groups(args, torch.device(device)), watched)
        with torch.no_grad():
            for _, layer in engine.numbered_layers():
                for parameter in layer.parameters():
                    parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.02)
        engine.weights_changed()
        for number in range(STEPS):
            if number == STEPS - 2:
                moments.clear()
            result = engine.train_step(_batch(case, engine.place))
            if not result.applied:
                raise RuntimeError(f"{case.layout}: the loss is {result.loss}, the step was skipped and shows nothing")
    kernels = device != "cpu" and use_kernels("swiglu", torch.empty(0, device=device, dtype=torch.bfloat16))
    ops: Ops = "cpu" if device == "cpu" else "kernels" if kernels else "torch"
    return Measured(engine.place.pp_rank, max(moments.values()), dict(moments), ops)


def predict(case: Case, device: str, ops: Ops) -> list[StageMemory]:
    args = case.args(device)
    zero = args.zero_optimization
    return plan_memory(
        args.whole_shape,
        ParallelLayout.of(args),
        args.seq_length,
        args.precision,
        isolate_documents=case.documents,
        ops=ops,
        reduce_bucket_size=zero.reduce_bucket_size,
        contiguous_gradients=zero.contiguous_gradients,
    )


def _batch(case: Case, place: Place) -> StepBatch:
    """A global batch whose micro-batches are created one by one."""
    import torch

    from megatron.engine.batches import StepBatch

    tokens = case.micro_batch * case.seq
    weight = torch.tensor(1.0 / tokens, device=place.device)
    micro_batches = _micro_batches(case, place.device) if place.reads_data else None
    return StepBatch(micro_batches, case.num_micro_batches, tokens * case.num_micro_batches, weight)


def _micro_batches(case: Case, device: Any) -> Iterator[dict[str, Any]]:
    import torch

    shape = (case.micro_batch, case.seq)
    for _ in range(case.num_micro_batches):
        if case.patch:
            patches = torch.randint(256, (*shape, 3 * case.patch**2), device=device, dtype=torch.uint8)
            mask = torch.ones(shape, dtype=torch.bool, device=device)
            yield {"patches": patches, "targets": patches.clone(), "mask": mask}
            continue
        tokens = torch.randint(case.vocab, shape, device=device)
        micro_batch = {"tokens": tokens, "labels": tokens.clone()}
        if case.documents:  # three of unequal length
            positions = torch.arange(case.seq, device=device)
            for start in (case.seq // 5, case.seq // 2):
                positions[start:] = torch.arange(case.seq - start, device=device)
            micro_batch["positions"] = positions.expand(shape).contiguous()
        yield micro_batch


class _Cuda:
    """Peak of the allocator above its initial state, which consists of library workspaces."""

    def __init__(self) -> None:
        import torch

        x = torch.ones(4096, 4096, device="cuda", dtype=torch.bfloat16)
        (x @ x).sum().item()
        del x
        self.before = torch.cuda.memory_allocated()

    def reset(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated() - self.before


class _Cpu:
    def __init__(self, live: Any) -> None:
        self.live = live

    def reset(self) -> None:
        self.live.reset_peak()

    def peak(self) -> int:
        return self.live.peak


@contextmanager
def _counter(device: str) -> Iterator[Any]:
    if device == "cpu":
        from benchmarks.live_bytes import LiveBytes

        with LiveBytes() as live:
            yield _Cpu(live)
    else:
        yield _Cuda()


def run_on_cpu(case: Case) -> list[Measured]:
    """Run all ranks of a case, forked from this process, which has imported everything."""
    return run_ranks_forked(measure, case.world_size, case)


def run_on_gpu(case: Case) -> list[Measured]:
    """Run one rank in this process, because CUDA does not survive a fork. All cases share the process group."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        torch.cuda.set_device(0)
        store = dist.HashStore()
        dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    measured = measure(0, 1, case, "cuda")
    _free("cuda")
    torch.cuda.empty_cache()
    return [measured]


def _free(device: str) -> None:
    """Release the memory of every tensor: something in DeepSpeed keeps unused engines alive."""
    import torch

    gc.collect()
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == device:
            thing.untyped_storage().resize_(0)


@dataclass(frozen=True)
class Row:
    """The fullest rank of a stage."""

    case: Case
    stage: int
    predicted: StageMemory
    measured: Measured

    @property
    def error(self) -> float:
        return self.predicted.allocated / self.measured.peak - 1.0


def rows(case: Case, device: str) -> list[Row]:
    measured = run_on_gpu(case) if device == "cuda" else run_on_cpu(case)
    predicted = predict(case, device, measured[0].ops)
    stages = [max((m for m in measured if m.stage == s), key=lambda m: m.peak) for s in range(case.pipe)]
    return [Row(case, stage, predicted[stage], found) for stage, found in enumerate(stages)]


def table(found: list[Row], device: str) -> str:
    """Markdown."""
    worst = max(found, key=lambda row: abs(row.error))
    where = "the CPU" if device == "cpu" else _gpu()
    lines = [
        "| model | layout | stage | predicted, MiB | counted, MiB | error | fullest in |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row.case.model} | {row.case.layout} | {row.stage} | {row.predicted.allocated / MIB:,.1f} | "
            f"{row.measured.peak / MIB:,.1f} | {row.error:+.1%} | {row.predicted.moment} |"
            for row in found
        ),
        "",
        f"Largest error of {len(found)} stages on {where}: {worst.error:+.1%} "
        f"({worst.case.model}: {worst.case.layout}, stage {worst.stage}).",
    ]
    return "\n".join(lines)


def _gpu() -> str:
    import torch

    return f"one {torch.cuda.get_device_name()}"


def fill(text: str, block: str, device: str) -> str:
    """`text` with `block` between the markers of the device's table; ValueError if one is missing."""
    begin, end = (f"<!-- {MARKERS[device]}:{edge} -->" for edge in ("begin", "end"))
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{begin} and {end} must each stand in the file once")
    head, rest = text.split(begin)
    return head + begin + "\n" + block + "\n" + end + rest.split(end)[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if available")
    parser.add_argument("--json", type=Path, help="also write the bytes of every phase to this file")
    parser.add_argument("--write", type=Path, help="put the table between its markers in this Markdown file")
    options = parser.parse_args()
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import megatron.engine.deepspeed  # noqa: F401  # once, before the ranks fork

    found: list[Row] = []
    for case in GPU_CASES if device == "cuda" else CPU_CASES:
        start = time.time()
        for row in rows(case, device):
            found.append(row)
            print(
                f"{row.case.model:32} {row.case.layout:44} stage {row.stage}  predicted "
                f"{row.predicted.allocated / MIB:10,.1f} MiB  counted {row.measured.peak / MIB:10,.1f} MiB  "
                f"{row.error:+6.1%}  {row.predicted.moment} ({time.time() - start:.1f} s)",
                flush=True,
            )
    print("\n" + table(found, device))
    if options.json:
        facts = [
            asdict(row.case)
            | {
                "stage": row.stage,
                "predicted": asdict(row.predicted) | {"chunks": [list(c) for c in row.predicted.chunks]},
            }
            | {"allocated": row.predicted.allocated, "measured": asdict(row.measured), "error": row.error}
            for row in found
        ]
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    if options.write:
        options.write.write_text(fill(options.write.read_text(), table(found, device), device))
    return 0 if all(abs(row.error) < 0.05 for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
