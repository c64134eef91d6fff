"""Everything named in the guides for developers exists, and is defined once."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_file_that_the_architecture_names_exists() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    named = {
        name
        for name in re.findall(r"`((?:megatron|tools|tests|benchmarks|csrc)/[\w./-]+)`", text)
        if "NAME" not in name
    }
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_architecture_lists_every_package_in_the_order_of_the_contract() -> None:
    contract = next(c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["id"] == "packages")
    order = [name.strip().removeprefix("megatron.") for layer in contract["layers"] for name in re.split("[|:]", layer)]
    diagram = (ROOT / "docs/architecture.md").read_text().split("```")[1]
    listed = [word for line in diagram.splitlines() for word in line[:36].split() if word in order]
    assert sorted(listed) == sorted(order)
    assert [order.index(name) for name in listed] == sorted(order.index(name) for name in listed)


def test_the_glossary_has_each_word_once_in_alphabetical_order() -> None:
    rows = [line.split("|")[1].strip() for line in (ROOT / "docs/glossary.md").read_text().splitlines() if "|" in line][
        2:
    ]
    assert rows == sorted(set(rows), key=str.lower)


def test_the_version_is_one() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == PROJECT["project"]["version"]
