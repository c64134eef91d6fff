"""Packaging. Packages are named one by one: `megatron` is a namespace shared with megatron-core, and `csrc`,
`launch` and `configs` would stop setuptools' automatic discovery."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent


def requirements(name: str) -> list[str]:
    lines = (HERE / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-r"))]


setup(
    packages=find_namespace_packages(
        include=[
            f"megatron.{name}{rest}"
            for name in (
                "neox_arguments",
                "launcher",
                "model",
                "ops",
                "tokenizer",
                "data",
                "checkpoint",
                "trainer",
            )
            for rest in ("", ".*")
        ]
    ),
    install_requires=requirements("requirements.txt"),
    extras_require={
        "data": requirements("requirements-data.txt"),
        "dev": requirements("requirements-dev.txt"),
        "wandb": ["wandb"],
    },
)
