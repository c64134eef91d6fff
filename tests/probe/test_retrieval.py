"""Halves of documents are cut in the middle, found if vectors carry a signal, and scored like in scikit-learn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tools.probe.cli import main
from tools.probe.features import read_features
from tools.probe.halves import split_in_halves
from tools.probe.retrieval import compare_halves, retrieval_report

pytestmark = pytest.mark.unit


def halves(documents: int, noise: float, seed: int, width: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Two noisy copies of one vector per document."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(documents, width))
    return tuple(common + noise * rng.normal(size=common.shape) for _ in range(2))  # type: ignore[return-value]


def write(path: Path, first: np.ndarray, second: np.ndarray, names: list[str] | None = None) -> Path:
    """Write vectors like embed.py, with the second halves first."""
    names = names or [f"d{number}" for number in range(len(first))]
    np.save(path, np.concatenate([second, first]).astype(np.float32))
    ids = [*(f"{name}#2" for name in names), *(f"{name}#1" for name in names)]
    path.with_suffix(".ids.jsonl").write_text("".join(json.dumps({"id": one}) + "\n" for one in ids))
    return path


def test_recall_and_auc_are_those_of_the_whole_matrix() -> None:
    from sklearn.metrics import roc_auc_score

    first, second = halves(700, 0.8, seed=1)  # more documents than rows in one piece
    first[5] = first[6] = second[5] = second[6]  # equal vectors: neither counts as the nearest
    found = compare_halves(first, second, centered=False)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (first, second))
    cosines, same = a @ b.T, np.eye(len(a), dtype=bool)
    assert found.auc == pytest.approx(roc_auc_score(same.ravel(), cosines.ravel()), abs=1e-7)
    nearest = cosines.argmax(1) == np.arange(len(a))
    nearest[[5, 6]] = False
    assert (found.hits == nearest).all()
    assert 0.3 < found.hits.mean() < 0.99  # neither bound is reached trivially
    assert found.mean_different == pytest.approx(cosines[~same].mean())
    assert found.different_counts.sum() == (~same).sum()


def test_vectors_without_a_signal_are_at_chance() -> None:
    first, _ = halves(400, 0, seed=1)
    second, _ = halves(400, 0, seed=2)
    found = compare_halves(first, second, centered=True)
    assert found.hits.mean() < 0.02
    assert abs(found.auc - 0.5) < 0.05


def test_a_common_part_is_seen_raw_and_not_centered() -> None:
    first, second = halves(300, 1, seed=1)
    shift = 40 * np.ones(first.shape[1])
    plain, shifted = (
        compare_halves(first, second, centered=True),
        compare_halves(first + shift, second + shift, centered=True),
    )
    assert shifted.auc == pytest.approx(plain.auc)
    assert (shifted.hits == plain.hits).all()
    assert compare_halves(first + shift, second + shift, centered=False).mean_different > 0.99
    assert abs(shifted.mean_different) < 0.05


def test_models_are_compared_on_the_same_documents(tmp_path: Path) -> None:
    base = read_features(write(tmp_path / "base.npy", *halves(300, 2.5, seed=3)))
    better = read_features(write(tmp_path / "better.npy", *halves(300, 1.0, seed=3)))
    report = retrieval_report({"base": base, "better": better}, sample=200)
    assert (report["documents"], report["documents_there"]) == (200, 300)
    centered = {name: report["models"][name]["layers"]["0"]["centered"] for name in ("base", "better")}
    assert centered["better"]["recall_at_1"] > centered["base"]["recall_at_1"] + 0.2
    low, high = centered["better"]["recall_at_1_wilson_95"]
    assert low < centered["better"]["recall_at_1"] < high
    test = report["models"]["better"]["against_base"]["centered"]
    assert (test["found_now"] - test["found_before"]) == test["gained"] - test["lost"]
    assert test["mcnemar_exact_p"] < 1e-6


def test_the_command_writes_a_report_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, noise in (("base", 2.0), ("adapted", 1.0)):
        write(tmp_path / f"{name}.npy", *halves(60, noise, seed=4))
    words = [f"{name}={tmp_path / name}.npy" for name in ("base", "adapted")]
    picture = tmp_path / "histograms.png"
    command = ["retrieval", *words, "--output", str(tmp_path / "out/r.json"), "--picture", str(picture)]
    assert main(command) == 0
    report = json.loads((tmp_path / "out/r.json").read_text())
    shown = f"{100 * report['models']['adapted']['layers']['0']['centered']['recall_at_1']:.1f} %"
    assert shown in capsys.readouterr().out
    assert picture.stat().st_size > 5000


@pytest.mark.parametrize(
    ("names", "ids", "message"),
    [
        (["x.npy"], ["d0#1", "d0#2"], "expected NAME=FILE"),
        (["a=a.npy"], ["d0#1", "d0#2", "d1#1", "d2#2"], "expected ids ending in #1 and #2"),
        (["a=a.npy"], ["d0#1", "d0#2", "d1#1", "d1#1"], "vectors repeat an id"),
        (["a=a.npy"], ["d0#1", "d0#2", "d1#1"], "expected one row per id"),
        (["a=a.npy"], None, "a.ids.jsonl: No such file"),
        (["a=b.npy"], None, "b.npy: No such file"),
        (["a=a.npy", "--picture", "x.txt"], ["d0#1", "d0#2", "d1#1", "d1#2"], "must end in one of .png"),
    ],
)
def test_what_cannot_be_compared_is_one_error(
    names: list[str],
    ids: list[str] | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.ones((4, 3), dtype=np.float32))
    if ids is not None:
        Path("a.ids.jsonl").write_text("".join(json.dumps({"id": one}) + "\n" for one in ids))
    assert main(["retrieval", *names, "--output", "r.json"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("r.json").exists()


def test_damaged_vectors_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = halves(5, 1, seed=0)
    first[2, 3] = np.nan
    path = write(tmp_path / "a.npy", first, second)
    assert main(["retrieval", f"a={path}", "--output", str(tmp_path / "r.json")]) == 2
    assert "not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "halves"),
    [("ab cd", ("ab", "cd")), ("a bcdefgh", ("a", "bcdefgh")), ("  one two  three ", ("one two", "three"))],
)
def test_documents_are_cut_at_the_white_space_in_their_middle(text: str, halves: tuple[str, str]) -> None:
    assert split_in_halves(text) == halves


def test_no_word_of_a_document_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join("abcdefgh"[: rng.integers(1, 8)] for _ in range(rng.integers(2, 60))) for _ in range(50)]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(texts)))
    assert main(["halves", str(path), str(tmp_path / "halves.jsonl"), "--min-words", "10"]) == 0
    records = [json.loads(line) for line in (tmp_path / "halves.jsonl").open()]
    long = {number: text for number, text in enumerate(texts) if len(text.split()) >= 10}
    joined = {}
    for first, second in zip(records[::2], records[1::2], strict=True):
        assert (first["id"].split("#")[1], second["id"].split("#")[1]) == ("1", "2")
        joined[int(first["id"].split("#")[0])] = f"{first['text']} {second['text']}"
    assert joined == long
    assert f"left out {50 - len(long)} with fewer than 10 words" in capsys.readouterr().out
