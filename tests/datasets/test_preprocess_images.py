"""Images in every format become the same pair; unusable ones are named; kills and workers change no byte."""

from __future__ import annotations

import io
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.data.header import file_crc32
from megatron.data.images import image, open_images, read_image_header
from megatron.data.indexed import DataError
from tests.support.made_images import blobs
from tools.datasets.imaging import importing, sources
from tools.datasets.imaging.decode import BandMoments, ImageDecoder
from tools.datasets.preprocess_images import main

pytestmark = pytest.mark.unit

IMAGES = blobs(11, 12)


def run(folder: Path, name: str, inputs: list[Path], *options: Any, expect: int = 0, workers: int = 1) -> str:
    prefix = str(folder / "out" / name)
    words = ["--input", *map(str, inputs), "--output-prefix", prefix, "--workers", str(workers), *map(str, options)]
    assert main(words) == expect
    return prefix


def pictures(folder: Path, images: Any = IMAGES, ending: str = "png") -> Path:
    from PIL import Image

    folder.mkdir(parents=True)
    for number, values in enumerate(images):
        Image.fromarray(values).save(folder / f"g{number:02d}.{ending}", quality=95)
    return folder


def written(prefix: str) -> list[bytes]:
    return [Path(f"{prefix}.{ending}").read_bytes() for ending in ("bin", "idx", "parquet", "json")]


def shards(folder: Path) -> list[Path]:
    """Write two Parquet files with images as in Hugging Face's: a struct of bytes and path, an id, a property."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    folder.mkdir()
    paths = []
    for part, numbers in enumerate(([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10])):
        cells = []
        for number in numbers:
            file = io.BytesIO()
            Image.fromarray(IMAGES[number]).save(file, "PNG")
            cells.append({"bytes": file.getvalue(), "path": f"{number}.png"})
        if part:
            cells[1] = {"bytes": b"\xff\xd8 no picture", "path": "x"}
        columns = {"image": cells, "dr8_id": [f"d{n}" for n in numbers], "redshift": [n / 10 for n in numbers]}
        paths.append(folder / f"train-{part}.parquet")
        pyarrow.parquet.write_table(pyarrow.table(columns), paths[-1])
    return paths


def test_every_kind_of_file_gives_the_same_images(tmp_path: Path) -> None:
    from astropy.io import fits

    folder = pictures(tmp_path / "png")
    np.savez_compressed(tmp_path / "a.npz", images=IMAGES, truth=np.arange(22.0).reshape(11, 2), names=["mag", "z"])
    np.savez(tmp_path / "chw.npz", images=IMAGES.transpose(0, 3, 1, 2))
    planes = tmp_path / "fits"
    planes.mkdir()
    for number, values in enumerate(IMAGES):
        cube = values.transpose(2, 0, 1).astype(">f4")  # FITS is big-endian
        fits.writeto(planes / f"g{number:02d}.fits", cube)
    prefixes = {
        "png": run(tmp_path, "png", [folder]),
        "npz": run(tmp_path, "npz", [tmp_path / "a.npz"]),
        "chw": run(tmp_path, "chw", [tmp_path / "chw.npz"], "--axes", "chw"),
        "fits": run(tmp_path, "fits", [planes]),
    }
    for kind, prefix in prefixes.items():
        file, info = open_images(prefix)
        assert len(file) == 11
        assert info.dtype == ("float32" if kind == "fits" else "uint8")
        for number in range(11):
            assert np.array_equal(image(file, info, number), IMAGES[number]), kind
        np.testing.assert_allclose(info.mean, IMAGES.reshape(-1, 3).mean(0), rtol=1e-6)
        np.testing.assert_allclose(info.std, IMAGES.reshape(-1, 3).std(0), rtol=1e-6)


def test_properties_lie_by_row(tmp_path: Path) -> None:
    import pyarrow.parquet

    np.savez(tmp_path / "a.npz", images=IMAGES, truth=np.arange(22.0).reshape(11, 2), names=["mag", "z"])
    table = pyarrow.parquet.read_table(run(tmp_path, "npz", [tmp_path / "a.npz"]) + ".parquet").to_pydict()
    assert list(table) == ["id", "mag", "z"]
    assert table["z"] == np.arange(1.0, 22, 2).tolist()
    more = tmp_path / "more.csv"
    more.write_text("dr8_id,mass\n" + "".join(f"d{n},{n * 2}\n" for n in range(1, 11)))
    options = ("--id-column", "dr8_id", "--properties", more)
    prefix = run(tmp_path, "hf", shards(tmp_path / "hf"), *options)
    table = pyarrow.parquet.read_table(prefix + ".parquet").to_pydict()
    kept = [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]
    assert table == {
        "id": [f"d{n}" for n in kept],
        "redshift": [n / 10 for n in kept],
        "mass": [None, *(n * 2 for n in kept[1:])],
    }
    file, info = open_images(prefix)
    assert all(np.array_equal(image(file, info, row), IMAGES[n]) for row, n in enumerate(kept))


def test_what_cannot_be_used_is_named_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    folder = pictures(tmp_path / "png")
    (folder / "a0.png").write_bytes(b"no picture")
    (folder / "g03.png").write_bytes((folder / "g03.png").read_bytes()[:200])
    Image.fromarray(IMAGES[0][:8]).save(folder / "small.png")
    Image.new("RGBA", (12, 12)).save(folder / "alpha.png")
    prefix = run(tmp_path, "png", [folder])
    header = read_image_header(prefix)
    assert header.documents == 10
    assert header.left_out == {"unreadable picture": 2, "mode RGBA": 1, "another shape": 1}
    named = Path(f"{prefix}.left_out.txt").read_text()
    assert all(f"{name}.png" in named for name in ("a0", "g03", "small", "alpha"))
    assert "left out: 2 unreadable picture" in capsys.readouterr().err
    run(tmp_path, "fatal", [folder], "--on-bad-image", "fatal", expect=2)
    assert not list((tmp_path / "out").glob("fatal*")), "nothing is left behind"


def test_a_damaged_fits_file_is_left_out(tmp_path: Path) -> None:
    """For the damaged file astropy raises zlib's own error, which is not an OSError."""
    from astropy.io import fits

    folder = tmp_path / "fits"
    folder.mkdir()
    for number, values in enumerate(IMAGES):
        fits.writeto(folder / f"g{number:02d}.fits.gz", values.transpose(2, 0, 1).astype(">f4"))
    content = bytearray((folder / "g01.fits.gz").read_bytes())
    content[40:80] = b"\xff" * 40
    (folder / "g01.fits.gz").write_bytes(content)
    assert read_image_header(run(tmp_path, "fits", [folder])).left_out == {"unreadable FITS file": 1}


def test_a_damaged_archive_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", images=IMAGES)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    run(tmp_path, "x", [tmp_path / "a.npz"], expect=2)
    assert "a.npz: no readable .npz archive: BadZipFile" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("x*"))


def test_nan_is_refused_or_masked(tmp_path: Path) -> None:
    images = IMAGES.astype(np.float32)
    images[3, 5, 5] = np.nan
    images[4, 5, 5] = np.inf
    np.savez(tmp_path / "a.npz", images=images)
    refused = read_image_header(run(tmp_path, "refused", [tmp_path / "a.npz"]))
    assert (refused.documents, refused.left_out) == (9, {"NaN": 1, "infinite values": 1})
    prefix = run(tmp_path, "masked", [tmp_path / "a.npz"], "--nan", "mask")
    assert read_image_header(prefix).left_out == {"infinite values": 1}
    file, info = open_images(prefix)
    assert np.isnan(image(file, info, 3)[5, 5]).all()
    assert np.isfinite(info.mean).all()


def test_the_middle_is_kept(tmp_path: Path) -> None:
    file, info = open_images(run(tmp_path, "png", [pictures(tmp_path / "png")], "--crop", 8))
    assert info.shape == (8, 8, 3)
    assert np.array_equal(image(file, info, 2), IMAGES[2, 2:10, 2:10])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: [folder / "absent"], "no such file or folder"),
        (lambda folder: [folder], "no images in it"),
    ],
)
def test_bad_input_is_one_sentence(make: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "x", make(tmp_path), expect=2)
    assert message in capsys.readouterr().err


def test_swapped_axes_are_asked_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", images=blobs(2, 20).transpose(0, 3, 1, 2))
    run(tmp_path, "x", [tmp_path / "a.npz"], expect=2)
    assert "give --axes chw" in capsys.readouterr().err


def test_workers_and_kills_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after each number of blocks, all recorded in the journal, and resumed by two workers."""

    class AtOnce(ThreadPoolExecutor):
        def submit(self, *words: Any) -> Any:  # type: ignore[override]
            done = super().submit(*words)
            done.result()
            return done

    monkeypatch.setattr(importing, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 4 * IMAGES[0].nbytes)
    many = [*shards(tmp_path / "hf"), pictures(tmp_path / "png"), pictures(tmp_path / "more", IMAGES[::-1])]
    options = ("--id-column", "dr8_id")
    expected = written(run(tmp_path, "whole", many, *options))
    for workers in (2, 5):
        assert written(run(tmp_path, f"of{workers}", many, *options, workers=workers))[:3] == expected[:3]
    monkeypatch.setattr(importing, "JOURNAL_SECONDS", -1.0)
    real = importing.in_order
    for stop in (1, 2, 5):

        def cut(*arguments: Any, stop: int = stop) -> Any:
            yield from itertools.islice(real(*arguments), stop)
            raise KeyboardInterrupt

        monkeypatch.setattr(importing, "in_order", cut)
        run(tmp_path, f"killed{stop}", many, *options, expect=130)
        monkeypatch.setattr(importing, "in_order", real)
        prefix = run(tmp_path, f"killed{stop}", many, *options, workers=2)
        assert written(prefix)[:3] == expected[:3]
        assert read_image_header(prefix).left_out == {"unreadable picture": 1}
        assert file_crc32(Path(f"{prefix}.bin")).endswith(read_image_header(prefix).crc32)
        assert not list((tmp_path / "out").glob("*.partial*"))


@pytest.mark.timeout(60)
def test_a_failure_in_one_worker_stops_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker that waits for its turn to write must not wait for the failed one forever."""
    real = ImageDecoder.usable

    def broken(self: ImageDecoder, block: Any, bad: Any) -> Any:
        if block.first == len(IMAGES) - 2:
            raise DataError("the disk is gone")
        return real(self, block, bad)

    monkeypatch.setattr(ImageDecoder, "usable", broken)
    monkeypatch.setattr(sources, "BLOCK_BYTES", IMAGES[0].nbytes)
    run(tmp_path, "x", [pictures(tmp_path / "png")], workers=3, expect=2)
    assert "the disk is gone" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("shape", [(9, 7, 3), (40, 50, 2), (600, 600, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_moments_are_those_of_the_values(shape: tuple[int, int, int], dtype: Any) -> None:
    """The sum of squares of 600 x 600 values of 255 exceeds the integers that fp32 represents exactly."""
    image = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    if shape[-1] == 1:
        image[:] = 255
    moments, values = BandMoments.of(image), image.reshape(-1, shape[-1]).astype(np.float64)
    assert moments.count == [len(values)] * shape[-1]
    np.testing.assert_allclose(moments.mean, values.mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.std(), values.std(0), rtol=1e-14)


def test_a_missing_package_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pictures(tmp_path / "png", IMAGES[:1])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "PIL" else True)
    run(tmp_path, "x", [folder], expect=2)
    assert "the package PIL, which is not installed: pip install .[images]" in capsys.readouterr().err
