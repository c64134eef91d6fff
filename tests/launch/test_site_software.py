"""Software recipes of the sites: shellcheck accepts them, their pins agree, and pip keeps a site's torch."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.support.requirements import need

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
FRONTIER = ROOT / "launch/frontier/software"
LUMI = ROOT / "launch/lumi/software"
RECIPES = {"frontier": FRONTIER / "build.sh", "lumi": LUMI / "neox-llama.def"}


def torch_of(site: str) -> str:
    lines = (ROOT / f"launch/{site}/software/torch.txt").read_text().splitlines()
    (pin,) = [line for line in lines if not line.startswith("#")]
    return pin.removeprefix("torch==")


def test_bash_and_shellcheck_read_the_recipe() -> None:
    subprocess.run(["bash", "-n", str(RECIPES["frontier"])], check=True)
    need("shellcheck", shutil.which("shellcheck") is not None, "apt-get install shellcheck")
    for script in (RECIPES["frontier"].read_text(), "#!/bin/sh\n" + section("post")):
        found = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout


def section(name: str) -> str:
    """A section of the definition of LUMI's image."""
    parts = re.split(r"^%(\w+)\n", RECIPES["lumi"].read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[name]


def test_what_the_image_copies_is_in_the_checkout() -> None:
    """Including everything that setup.py reads."""
    sources = [line.split()[0] for line in section("files").splitlines() if line.strip()]
    assert all((ROOT / source).exists() for source in sources)
    read = set(re.findall(r'requirements\("(.*?)"\)', (ROOT / "setup.py").read_text()))
    assert read <= set(sources)


@pytest.mark.parametrize("site", sorted(RECIPES))
def test_pins_agree(site: str) -> None:
    """torch is installed in the version pinned by the constraint, and kernels are built for the MI250X."""
    text, version = RECIPES[site].read_text(), torch_of(site)
    number, local = version.split("+")
    assert f"--index-url https://download.pytorch.org/whl/{local} torch=={number}" in text
    assert text.index(f"torch=={number}") < text.index("requirements.txt" if site == "frontier" else "--requirement")
    assert "NEOX_GPU_ARCHS=gfx90a" in text
    assert "ot built" in text
    made = yaml.safe_load((ROOT / f"launch/{site}/site.yml").read_text())["software"]
    assert Path(next(iter(made.values()))).name in text


def test_frontiers_kernels_are_built_with_the_modules_of_the_job() -> None:
    job = (ROOT / "launch/frontier/environment.sh").read_text()
    modules = re.search(r"^module load (.*)$", job, re.MULTILINE)
    assert modules
    ours = re.search(r"^module load (.*)$", RECIPES["frontier"].read_text(), re.MULTILINE)
    assert ours
    network = {"rccl-net-plugin"}  # no kernel is built against it
    assert set(modules[1].split()) - network == set(ours[1].split()) - {"miniforge3"}


# --- pip


def wheel(folder: Path, name: str, version: str) -> None:
    """Write a wheel without content."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


def resolved(folder: Path, *words: str) -> dict[str, str]:
    """Versions that pip would install for requirements.txt from an index of empty packages, by name."""
    report = folder / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-index", "--quiet"]
    command += ["--find-links", str(folder), "--report", str(report), "-r", str(ROOT / "requirements.txt"), *words]
    subprocess.run(command, check=True, capture_output=True, text=True)
    items = json.loads(report.read_text())["install"]
    return {item["metadata"]["name"]: item["metadata"]["version"] for item in items}


@pytest.mark.parametrize("site", sorted(RECIPES))
def test_pip_leaves_the_sites_torch_alone(tmp_path: Path, site: str) -> None:
    """With the recipe's constraint; without it, the index's newer version would be installed."""
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and line[0] != "#"
    )
    canonical = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    for line in lines:
        name = re.split(r"[<>=\[ ]", line)[0]
        if name != "torch":
            wheel(tmp_path, name.replace("-", "_"), canonical[re.sub(r"[-_.]+", "-", name).lower()])
    wheel(tmp_path, "torch", torch_of(site))
    wheel(tmp_path, "torch", pins["torch"])
    kept = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("torch==")]
    constraint = tmp_path / "constraints.txt"
    constraint.write_text("\n".join([*kept, f"torch=={torch_of(site)}"]) + "\n")
    assert resolved(tmp_path, "--constraint", str(constraint))["torch"] == torch_of(site)
    assert resolved(tmp_path)["torch"] == pins["torch"]


def test_make_test_site_uses_the_torch_of_the_site() -> None:
    """`make test-site`, whose commands are only printed by make; nothing is installed."""
    number = torch_of("frontier").partition("+")[0]
    printed = subprocess.run(
        ["make", "--dry-run", "--always-make", "test-site"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert f"--extra-index-url https://download.pytorch.org/whl/cpu torch=={number}" in printed
    assert f'echo "torch=={number}" >>' in printed
    for tier in ('-m "unit and not slow"', "tests/parity", "tests/checkpoint"):
        assert tier in printed


@pytest.mark.parametrize("reachable", [["2.10.0", "2.10.0+cpu"], ["2.10.0"]], ids=["with CPU wheels", "PyPI alone"])
def test_pip_prefers_the_wheel_for_cpus_and_does_without(tmp_path: Path, reachable: list[str]) -> None:
    """The requirements of `make test-site`, resolved from an index of stand-ins. Mutation: ask for 2.10.0+cpu."""
    for version in (*reachable, "2.13.0+cpu"):
        wheel(tmp_path, "torch", version)
    asked = re.search(r"torch==[^\s\"]+", (ROOT / "Makefile").read_text().partition("\n$(SITE)/.complete:")[2])
    assert asked
    requirement = asked[0].replace("$(SITE_TORCH)", torch_of("frontier").partition("+")[0])
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-index", "--quiet"]
    command += ["--find-links", str(tmp_path), "--report", str(report), requirement]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (found,) = json.loads(report.read_text())["install"]
    assert found["metadata"]["version"] == reachable[-1]
