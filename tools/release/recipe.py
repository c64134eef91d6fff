"""The recipe of a release: the files to release, and facts that only the publisher knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron.common.errors import UserError


class ReleaseError(UserError):
    """A release that cannot be made or read; the message states what to do."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StageEntry(_Part):
    """A training stage: its `save` folder, and its `log_dir` if the one in the configuration no longer exists."""

    name: str
    checkpoint: Path
    logs: Path | None = None


class DataEntry(_Part):
    """Facts about a data source that only the publisher knows; its name is the last part of the prefix."""

    license: str
    origin: str = ""


class TestEntry(_Part):
    """A test of the released model: `summary.json` of mcq.py, or `eval_results.json` of eval.py."""

    __test__ = False  # not a test for pytest
    name: str
    summary: Path


class ReleaseRecipe(_Part):
    """The YAML of a release; docs/releasing.md describes its keys."""

    name: str
    license: str
    model: Path  # a Hugging Face folder, or a checkpoint to export
    base_models: list[str] = []
    stages: list[StageEntry] = Field(min_length=1)
    merge: Path | None = None  # the folder written by tools/merge
    data: dict[str, DataEntry] = {}
    evaluation: list[TestEntry] = []
    machine: str = ""
    limitations: str
    record_steps: Literal["all"] | int = "all"


def read_recipe(path: Path) -> ReleaseRecipe:
    """Read the recipe in a YAML file; its paths are relative to the working directory of the command."""
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        return ReleaseRecipe.model_validate(content)
    except yaml.YAMLError as error:
        raise ReleaseError(f"{path} is not YAML: {error}") from None
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise ReleaseError(f"{path}: {'; '.join(lines)}. Keys: {', '.join(ReleaseRecipe.model_fields)}") from None
