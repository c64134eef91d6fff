"""The shared namespace `megatron`: our folders are in the package list and claimed by no other project."""

from __future__ import annotations

import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest

from benchmarks.house import ORDER

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
OURS = {path.name for path in (ROOT / "megatron").iterdir() if path.is_dir() and path.name != "__pycache__"}

# Subpackages of `megatron` that the distributions of Megatron-LM, Megatron-Bridge and Energon install or have claimed.
TAKEN = {
    "core",
    "training",
    "bridge",
    "energon",
    "rl",
    "post_training",
    "inference",
    "elastification",
    "legacy",
}


def test_megatron_is_a_namespace() -> None:
    assert not (ROOT / "megatron" / "__init__.py").exists()
    loose = [path.name for path in (ROOT / "megatron").iterdir() if path.is_file()]
    assert not loose, f"modules directly under megatron/ can clash with another distribution's: {loose}"


def test_our_package_names_are_not_claimed_by_others() -> None:
    files = distribution("megatron-core").files or []
    installed = {file.parts[1] for file in files if len(file.parts) > 2 and file.parts[0] == "megatron"}
    assert "core" in installed
    assert not OURS & (TAKEN | installed)


def test_the_import_contract_names_every_package_in_one_order() -> None:
    """lint-imports does not check a package that is missing in its contract."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    order = [f"megatron.{name}" for name in ORDER]
    assert {name.removeprefix("megatron.") for name in order} == OURS
    assert [name for name in settings["root_packages"] if name.startswith("megatron.")] == order
    contracts = {contract["id"]: contract for contract in settings["contracts"]}
    assert contracts["packages"]["layers"] == order
    assert all((ROOT / "megatron" / name / "__init__.py").exists() for name in OURS)
