"""The exported model evaluated by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.evaluation_models import write_export


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory, vocab_folder: Path) -> Path:
    return write_export(tmp_path_factory.mktemp("export") / "hf", vocab_folder)
