"""The software of a rank: versions by name, detection of PyPI's unrelated apex, and differing ranks."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from megatron.parallel.gpu_placement import Seat
from megatron.preflight.diagnosis import Roster
from megatron.preflight.software import apex_kind, different_software, installed_software, network_plugin, software_line

pytestmark = pytest.mark.unit


def test_versions_are_those_of_the_packages() -> None:
    found = installed_software()
    assert found["torch"] == torch.__version__
    assert found["DeepSpeed"] == metadata.version("deepspeed")
    assert found["megatron-core"] == metadata.version("megatron-core")
    assert software_line(found).startswith(f"software: Python {sys.version.split()[0]}, torch {torch.__version__}")


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert installed_software()["DeepSpeed"] == "none"


def test_rocm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.1.25424")
    assert installed_software()["ROCm"] == "7.1.25424"


@pytest.mark.parametrize(
    ("modules", "expected"),
    [((), "not NVIDIA's or ROCm's but PyPI's package of that name"), (("normalization", "optimizers"), "of unknown")],
)
def test_apex_is_told_from_its_namesake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modules: tuple[str, ...], expected: str
) -> None:
    for name in ("", *modules):
        (tmp_path / "apex" / name).mkdir(exist_ok=True, parents=True)
        (tmp_path / "apex" / name / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert apex_kind().startswith(expected)


def test_no_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert apex_kind() == "none"


def test_the_plugin_is_looked_for_where_the_loader_does(tmp_path: Path) -> None:
    assert network_plugin({}) == "none on LD_LIBRARY_PATH (librccl-net.so or libnccl-net.so)"
    (tmp_path / "librccl-net.so").touch()
    assert network_plugin({"LD_LIBRARY_PATH": f":/nowhere:{tmp_path}"}) == str(tmp_path / "librccl-net.so")


def test_ranks_that_differ_are_named() -> None:
    roster = Roster(4)
    roster.seats.update({rank: Seat(rank, f"n{rank // 2}", rank % 2, 0, rank, 0, None) for rank in range(4)})
    same = {"torch": "2.10.0", "RCCL": "2.27.3"}
    assert different_software([same] * 4, roster) == []
    lines = different_software([same, same, same, same | {"torch": "2.9.0"}], roster)
    assert lines == ["  torch 2.9.0 on rank 3 on n1, 2.10.0 on 3 ranks"]
