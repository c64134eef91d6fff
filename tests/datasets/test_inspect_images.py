"""Output of `inspect_data.py` and `build_indices.py` for images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.support.configurations import IMAGES, keys
from tests.support.made_images import blobs, import_archive
from tools.datasets import build_indices, inspect_data

pytestmark = pytest.mark.unit


def test_images_are_shown_with_the_order_of_their_patches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    prefix = import_archive(tmp_path, "galaxies", blobs(8, 16), mag=np.arange(8.0))
    grid = tmp_path / "grid.png"
    words = [prefix, "--samples", "7", "--grid", str(grid), "--patch-size", "4"]
    assert inspect_data.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("8 images of 16 x 16 pixels, 3 bands (r, g, b) as uint8, 0.0 MB")
    assert "properties: id, mag" in lines
    assert "16 patches of 4 x 4 in spiral order; seq_length is 15, or 16 with sequence_parallel." in "\n".join(lines)
    table = [list(map(int, line.split())) for line in lines if line.replace(" ", "").isdigit()]
    assert table == [[6, 7, 8, 9], [5, 0, 1, 10], [4, 3, 2, 11], [15, 14, 13, 12]]
    height, width, _ = np.asarray(Image.open(grid)).shape
    assert width > height > 0
    assert inspect_data.main([prefix, "--vocab-file", "tokenizer.json"]) == 2
    assert "--vocab-file is for text" in capsys.readouterr().err
    assert inspect_data.main([prefix, "--patch-size", "5"]) == 2
    assert "does not divide 16 x 16" in capsys.readouterr().err


def test_damage_is_found_before_a_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = import_archive(tmp_path, "galaxies", blobs(8, 16))
    run = tmp_path / "run.yml"
    run.write_text(yaml.safe_dump(keys(**IMAGES, train_data_paths=[prefix], seq_length=3)))
    assert build_indices.main([str(run), "--check-content"]) == 0
    assert "offsets and checksum are correct" in capsys.readouterr().out
    damaged = Path(f"{prefix}.bin")
    damaged.write_bytes(b"\x01" + damaged.read_bytes()[1:])
    assert build_indices.main([str(run), "--check-content"]) == 2
    assert "the file is damaged" in capsys.readouterr().err
    run.write_text(yaml.safe_dump(keys(**IMAGES, train_data_paths=[prefix], seq_length=9)))
    assert build_indices.main([str(run)]) == 2
    assert "write seq_length: 3 (or 4" in capsys.readouterr().err
