"""Packaging. Packages are named one by one: `megatron` is a namespace shared with megatron-core, and `csrc`,
`launch` and `configs` would stop setuptools' automatic discovery. Of `tools` the converter and the merge are installed,
as `neox_tools`: a package named `tools` would be in everybody's way."""

import importlib.util
import sys
import tomllib
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent


def kernel_builder() -> ModuleType:
    """megatron/ops/build.py by itself: importing the package would need torch."""
    spec = importlib.util.spec_from_file_location("kernel_builder", HERE / "megatron" / "ops" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_ext):
    """The GPU kernels for NEOX_GPU_ARCHS, or for the toolchain that is found; without one, nothing and no error."""

    def run(self) -> None:
        builder = kernel_builder()
        try:
            target = builder.default_target()
            if target is None:
                print("no GPU toolchain that fits this torch: installing without compiled kernels")
                return
            root = HERE if self.inplace else Path(self.build_lib).resolve()
            print(f"built {builder.build_library(target, root / 'megatron' / 'ops')}")
        except builder.BuildError as error:
            sys.exit(f"kernels: {error}")

    def get_outputs(self) -> list[str]:
        library = Path(self.build_lib) / "megatron" / "ops" / kernel_builder().LIBRARY_NAME
        return [str(library)] if library.exists() else []


def requirements(name: str) -> list[str]:
    lines = (HERE / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-r"))]


def our_packages() -> list[str]:
    """The packages under `megatron` that are ours, from the import contracts."""
    settings = tomllib.loads((HERE / "pyproject.toml").read_text())
    return [name for name in settings["tool"]["importlinter"]["root_packages"] if name.startswith("megatron.")]


PROGRAM = find_namespace_packages(include=[name + rest for name in our_packages() for rest in ("", ".*")])
TOOLS = find_namespace_packages("tools", include=["convert_hf", "convert_hf.*", "merge", "merge.*"])

setup(
    packages=[*PROGRAM, "neox_tools", *(f"neox_tools.{name}" for name in TOOLS)],
    package_dir={"neox_tools": "tools"},
    package_data={"megatron.tokenizer": ["chat_templates/*.jinja"]},
    install_requires=requirements("requirements.txt"),
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[Extension("megatron.ops.libneox_kernels", [])] if kernel_builder().default_target() else [],
    extras_require={
        "data": requirements("requirements-data.txt"),
        "images": requirements("requirements-images.txt"),
        "eval": requirements("requirements-eval.txt"),
        "examples": requirements("requirements-examples.txt"),
        "dev": requirements("requirements-dev.txt"),
        "wandb": ["wandb"],
    },
)
