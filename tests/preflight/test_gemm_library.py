"""hipBLASLt or rocBLAS: a layer's products are timed, the faster library is chosen, and torch is configured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.neox_arguments import ConfigError, NeoXArgs
from megatron.parallel.process_groups import choose_gemm_library
from megatron.preflight import gemm_library
from tests.support.configurations import keys

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def configuration(**changes: Any) -> NeoXArgs:
    return NeoXArgs.from_dict(keys(**{"seq_length": 32, "num_gpus": 2, "model_parallel_size": 2} | changes), 2)


@pytest.fixture
def preferred(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch as if built for ROCm; returns the list of libraries it is told to prefer."""
    told = ["default"]

    def prefer(name: str | None = None) -> str:
        if name is not None:
            told.append(name)
        return told[-1]

    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", prefer)
    return told


def test_the_products_are_those_of_a_layer() -> None:
    """For each of a rank's four matrices: forward, gradient of the input, gradient of the weight."""
    args = configuration()
    products = gemm_library.layer_products(args)
    h, f, kv = args.hidden_size, args.intermediate_size, args.num_kv_heads * args.shape.head_dim
    tokens = args.train_micro_batch_size_per_gpu * 32
    shapes = [tuple(multiply().shape) for multiply in gemm_library.multiplications(args, CPU)]
    matrices = [(h, (h + 2 * kv) // 2), (h // 2, h), (h, f), (f // 2, h)]
    assert shapes == [shape for i, o in matrices for shape in ((tokens, o), (tokens, i), (o, i))]
    assert [product.flops for product in products] == [2.0 * tokens * i * o for i, o in matrices for _ in range(3)]


def test_both_are_timed_and_the_choice_of_torch_is_restored(preferred: list[str]) -> None:
    found = gemm_library.time_libraries(configuration(), CPU)
    assert {library: len(seconds) for library, seconds in found.items()} == {"hipBLASLt": 12, "rocBLAS": 12}
    assert preferred == ["default", "cublaslt", "cublas", "default"]


def test_the_faster_over_all_products_is_chosen() -> None:
    args = configuration()
    slow = {"hipBLASLt": [3e-3] * 12, "rocBLAS": [1e-3] * 6 + [4e-3] * 6}
    lines = gemm_library.choice_lines(args, [slow, slow])
    assert lines[0].startswith(
        "GEMM library: rocBLAS, 20.0% faster than hipBLASLt over the products of a layer: gemm_lib"
    )
    assert "gemm_library: rocblas (configured: default)" in lines[0]
    assert "would be 25.0% faster still" in lines[0]
    assert len(lines) == 13
    assert lines[1].split()[:3] == ["attention", "in,", "forward"]
    other = {"hipBLASLt": [1e-3] * 12, "rocBLAS": [2e-3] * 12}
    assert "gemm_library: hipblaslt (" in gemm_library.choice_lines(args, [other])[0]


def test_a_cpu_has_nothing_to_choose() -> None:
    assert gemm_library.NOTHING_TO_CHOOSE["cpu"] == "GEMM library: nothing to choose on a CPU"


def test_the_key_tells_torch(preferred: list[str]) -> None:
    choose_gemm_library(configuration())
    assert preferred == ["default"]
    choose_gemm_library(configuration(gemm_library="rocblas"))
    choose_gemm_library(configuration(gemm_library="hipblaslt"))
    assert preferred == ["default", "cublas", "cublaslt"]


def test_without_rocm_the_key_is_refused() -> None:
    assert torch.version.hip is None
    with pytest.raises(ConfigError, match="gemm_library: rocblas, but this PyTorch is not built for ROCm"):
        choose_gemm_library(configuration(gemm_library="rocblas"))
