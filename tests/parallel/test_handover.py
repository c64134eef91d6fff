"""The configuration reaches the ranks completely or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megatron.neox_arguments import ConfigError, NeoXArgs
from megatron.parallel.handover import rank_args, write_handover
from tests.support.configurations import VALID

pytestmark = pytest.mark.unit


def test_the_configuration_arrives_as_it_left(tmp_path: Path) -> None:
    args = NeoXArgs.from_dict(VALID)
    path = write_handover(args, tmp_path)
    assert rank_args(["--neox-args", str(path)]) == args


@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda text: text.replace("128", "129")])
def test_a_damaged_configuration_is_not_used(tmp_path: Path, damage: Callable[[str], str]) -> None:
    path = write_handover(NeoXArgs.from_dict(VALID), tmp_path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ConfigError, match="the file was changed or only partly read"):
        rank_args(["--neox-args", str(path)])


def test_ranks_started_by_others_read_the_files_themselves(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(yaml.safe_dump(VALID))
    args = rank_args([str(tmp_path / "a"), "--train_iters", "3"])
    assert args.train_iters == 3
    with pytest.raises(ConfigError, match="configuration files are missing"):
        rank_args([])
