"""On a single real GPU (CUDA or ROCm): the kernels, the model using them, and a whole run by deepy.py.

These tests are skipped without a GPU. Build the kernels first:
`python setup.py build_ext --inplace`, then `python -m pytest -m gpu`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from megatron import ops
from megatron.ops.library import PACKAGED_LIBRARY
from megatron.parallel.place import Place
from tests.support.models import LLAMA3_ROPE, Case, fill_stage
from tests.support.requirements import need
from tests.support.token_files import random_documents

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(200)]

ROOT = Path(__file__).resolve().parents[2]
CASE = Case(heads=8, kv_heads=2, head_dim=128, layers=3, intermediate=2816, vocab=1000, rope=LLAMA3_ROPE, seq=256)
FLOOR = 2**-18  # relative to the largest value: the accuracy of fp32 GEMMs over a thousand terms


@pytest.fixture(autouse=True, scope="module")
def _gpu() -> None:
    need("gpu", torch.cuda.is_available(), "torch sees no GPU")
    need("gpu", PACKAGED_LIBRARY.exists(), "build the kernels: python setup.py build_ext --inplace")


@pytest.fixture
def _world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as the only rank, with NCCL (RCCL)."""
    from megatron.parallel.process_groups import form_groups

    monkeypatch.setenv("LOCAL_RANK", "0")  # DeepSpeed's pipeline requires it
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    form_groups(CASE.neox(world_size=1, distributed_backend="nccl"))
    yield
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    ops.configure("auto")


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(CASE.vocab, (2, CASE.seq), generator=generator) for _ in range(2))
    labels[0, 5:60] = -100
    return ids, labels


def ours(mode: str, precision: str) -> tuple[str, list[Tensor]]:
    """The chosen implementations; logits, losses, gradients of the embedding and of the first norm."""
    from megatron.engine.deepspeed_module import LlamaPipelineModule

    args = CASE.neox(world_size=1, distributed_backend="nccl", kernels=mode, precision=precision)
    place = Place.of(args, 0, 0, torch.device("cuda", 0))
    chosen = ops.configure(mode, place.device)
    model = LlamaPipelineModule(args, place)
    fill_stage(model, place, dict(CASE.hugging_face().state_dict()), args)
    ids, labels = (t.cuda() for t in batch())
    logits = model(ids)
    losses = model.loss_fn.token_losses(logits, labels)
    losses.sum().backward()
    parameters = dict(model.named_parameters())
    picked = [next(n for n in parameters if part in n) for part in ("word_embeddings", "input_layernorm")]
    gradients = [parameters[name].grad for name in picked]
    assert all(g is not None for g in gradients)
    return chosen, [logits.detach(), losses.detach(), *(g for g in gradients if g is not None)]


def truth(rounded: bool) -> list[Tensor]:
    """The same tensors from transformers in fp64, with the model's weights."""
    model = CASE.hugging_face()
    model = (model.bfloat16() if rounded else model).double().cuda()
    ids, labels = (t.cuda() for t in batch())
    logits = model(ids).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    losses.sum().backward()
    inner = model.model
    gradients = [inner.embed_tokens.weight.grad, inner.layers[0].input_layernorm.weight.grad]
    return [logits.detach(), losses.detach().view(labels.shape), *gradients]


@pytest.mark.usefixtures("_world")
@pytest.mark.parametrize("precision", ["fp32", "bfloat16"])
def test_the_model_on_kernels_is_as_right_as_on_references(precision: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    exact = truth(precision == "bfloat16")
    chosen, kernels = ours("required", precision)
    assert "compiled kernels" in chosen
    chosen, references = ours("reference", precision)
    assert "PyTorch references" in chosen
    assert not all(torch.equal(a, b) for a, b in zip(kernels, references, strict=True)), "both ran the same code"
    names = ("logits", "losses", "embedding gradient", "norm gradient")
    for name, kernel, plain, true in zip(names, kernels, references, exact, strict=True):
        error, own = ((t.double() - true).abs().max() for t in (kernel, plain))
        assert error <= max(2 * own, FLOOR * true.abs().max()), f"{name}: {error:.3g}, the references have {own:.3g}"


@pytest.mark.usefixtures("_world")
def test_logits_equal_transformers_in_fp32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    _, (logits, *_) = ours("required", "fp32")
    model = CASE.hugging_face().cuda()
    with torch.no_grad():
        theirs = model(batch()[0].cuda()).logits
    assert float((logits - theirs).abs().max()) < 1e-5


def test_every_kernel_passes_its_self_test() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron.ops.selftest"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every operator is right" in done.stdout


def deepy(folder: Path, **changes: Any) -> subprocess.CompletedProcess[str]:
    """A run of eight steps on one device that saves in the middle and at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = random_documents(folder / "tokens", CASE.vocab, 40, (100, 900))
    settings = dict(CASE.neox().merged) | {
        "train_data_paths": [tokens],
        "train_iters": 8,
        "log_interval": 1,
        "log_dir": str(folder / "log"),
        "save": str(folder / "checkpoints"),
        "checkpoint_factor": 4,
        "checkpoint_activations": True,
        **changes,
    }
    (folder / "run.yml").write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not None}))
    command = [sys.executable, "deepy.py", "train.py", str(folder / "run.yml")]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=150)


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "log/metrics.jsonl").read_text().splitlines()]
    return [r["train/lm_loss"] for r in records if "train/lm_loss" in r]


@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_a_run_on_the_gpu_follows_the_cpu_and_resumes(tmp_path: Path, engine: str) -> None:
    """In fp32 the losses follow the CPU's; in bf16 on kernels, a run resumed halfway ends with the same bits."""
    cpu, gpu, whole, half = (tmp_path / name for name in ("cpu", "gpu", "whole", "half"))
    done = deepy(cpu, kernels="reference", save=None, checkpoint_factor=None)
    assert done.returncode == 0, done.stderr
    on_gpu = {"distributed_backend": "nccl", "kernels": "required", "engine": engine}
    done = deepy(gpu, **on_gpu, save=None, checkpoint_factor=None)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compiled kernels" in done.stdout
    assert "ranks: 1 on 1 node" in done.stdout
    assert losses(gpu) == pytest.approx(losses(cpu), rel=2e-4)

    done = deepy(whole, **on_gpu, precision="bfloat16")
    assert done.returncode == 0, done.stdout + done.stderr
    start = {"load": str(whole / "checkpoints"), "iteration": 4, "from_scratch": False}
    done = deepy(half, **on_gpu, precision="bfloat16", **start)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(half) == losses(whole)[4:]
    last = [sorted((f / "checkpoints/global_step8").glob("layer_*.pt")) for f in (whole, half)]
    assert len(last[0]) == CASE.layers + 3
    for one, other in zip(*last, strict=True):
        tensors = [torch.load(path, weights_only=True) for path in (one, other)]
        assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0] | tensors[1])


def test_fp16_on_the_gpu_follows_fp32_and_resumes_with_its_scale(tmp_path: Path) -> None:
    """A loss scale that starts far too high falls until steps are applied; a resumed run has the same bits."""
    plain, whole, half = (tmp_path / name for name in ("plain", "whole", "half"))
    on_gpu = {"distributed_backend": "nccl", "kernels": "required"}
    done = deepy(plain, **on_gpu, save=None, checkpoint_factor=None)
    assert done.returncode == 0, done.stdout + done.stderr
    fp16 = {"precision": "fp16", "fp16": {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}}
    done = deepy(whole, **on_gpu, **fp16, train_iters=24, checkpoint_factor=12)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(whole)[0] == pytest.approx(losses(plain)[0], abs=5e-3)
    assert "fp16 gradients overflow at loss scale 1.67772e+07" in done.stdout
    assert losses(whole)[-1] < losses(whole)[0]
    start = {"load": str(whole / "checkpoints"), "iteration": 12, "from_scratch": False, "checkpoint_factor": 24}
    done = deepy(half, **on_gpu, **fp16, train_iters=24, **start)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(half) == losses(whole)[12:]
