"""The recipe of a release: what is released, and what only its maker knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron.common.errors import UserError


class ReleaseError(UserError):
    """A release that cannot be made or read; the message says what to do."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StageEntry(_Part):
    """A training: its `save` folder, and its `log_dir` where the configuration names none that is still there."""

    name: str
    checkpoint: Path
    logs: Path | None = None


class DataEntry(_Part):
    """What the maker knows of a data source; its name is that of the prefix, without its folder."""

    license: str
    origin: str = ""


class TestEntry(_Part):
    """A test of the released model: `summary.json` of mcq.py, or `eval_results.json` of eval.py."""

    __test__ = False  # no test of pytest's
    name: str
    summary: Path


class ReleaseRecipe(_Part):
    name: str
    license: str
    model: Path  # a Hugging Face folder, or a checkpoint that is exported
    base_models: list[str] = []
    stages: list[StageEntry] = Field(min_length=1)
    merge: Path | None = None  # the folder that tools/merge wrote
    data: dict[str, DataEntry] = {}
    evaluation: list[TestEntry] = []
    machine: str = ""
    limitations: str
    record_steps: Literal["all"] | int = "all"


def read_recipe(path: Path) -> ReleaseRecipe:
    """The recipe in a YAML file; paths in it are relative to where the command runs."""
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        return ReleaseRecipe.model_validate(content)
    except yaml.YAMLError as error:
        raise ReleaseError(f"{path} is not YAML: {error}") from None
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise ReleaseError(f"{path}: {'; '.join(lines)}. Keys: {', '.join(ReleaseRecipe.model_fields)}") from None
