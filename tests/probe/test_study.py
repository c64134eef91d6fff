"""Probes find a planted signal in the layer where it was planted, and nothing in noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.made_images import blobs, import_archive
from tools.probe.cli import main
from tools.probe.features import Features
from tools.probe.inputs import RawInputs, read_inputs
from tools.probe.labels import Property, read_properties
from tools.probe.linear import cross_validate, predict, score
from tools.probe.study import Study, StudyOptions, is_test

pytestmark = pytest.mark.unit

ITEMS, WIDTH, PLANTED = 600, 16, 2
SMALL = 200
IDS = [f"g{number}" for number in range(ITEMS)]
OPTIONS = StudyOptions(draws=200)


def features(values: np.ndarray, ids: list[str] | None = None) -> Features:
    return Features(Path("vectors.npy"), ids or IDS, tuple(range(values.shape[1])), values.astype(np.float32))


def truth(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A number and one of three classes for each item; one follows from the other."""
    number = np.random.default_rng(seed).normal(size=ITEMS)
    return number, np.digitize(number, [-0.5, 0.6])


def planted(values: np.ndarray, layer: int = PLANTED, seed: int = 1) -> np.ndarray:
    """Noise [items, 4 layers, width]; one layer carries the values in some of its directions."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(ITEMS, 4, WIDTH))
    table[:, layer] += 2 * values[:, None] * rng.normal(size=WIDTH)
    return table


def number_of(values: np.ndarray) -> Property:
    return Property("mass", "ridge", IDS, values)


def classes_of(values: np.ndarray) -> Property:
    return Property("kind", "logistic", IDS, values, ("a", "b", "c"))


def test_a_planted_signal_is_found_in_its_layer_and_noise_is_not() -> None:
    number, classes = truth()
    trained, untrained = features(planted(number)), features(planted(np.zeros(ITEMS), seed=2))
    report = Study([number_of(number), classes_of(classes)], trained, untrained).run(OPTIONS)
    mass, kind = report["properties"]["mass"], report["properties"]["kind"]
    for one, least in ((mass, 0.9), (kind, 0.8)):
        assert one["sources"]["trained"]["choice"] == PLANTED
        assert one["sources"]["trained"]["test"] > least
        low, high = one["sources"]["trained"]["interval_95"]
        assert low < one["sources"]["trained"]["test"] < high
        assert one["trained_minus"]["untrained"]["interval_95"][0] > 0.3
    assert mass["sources"]["untrained"]["test"] < 0.05
    assert kind["sources"]["untrained"]["test"] < kind["most_frequent"] + 0.1
    crossed = mass["sources"]["trained"]["cross_validated"]
    assert all(crossed[str(layer)] < 0.05 for layer in range(4) if layer != PLANTED)
    assert mass["fit_items"] + mass["test_items"] == ITEMS
    assert report["mean_r2"]["trained"] == mass["sources"]["trained"]["test"]


def test_the_layer_is_not_chosen_on_the_test_set() -> None:
    """A layer that carries the answers of the test set only is not chosen; choosing by test scores would choose it."""
    number, _ = truth()
    table = planted(0.15 * number)  # weak, so that cross-validation prefers it only slightly
    in_test = np.array([is_test(name, OPTIONS) for name in IDS])
    table[in_test, 0, :] = number[in_test, None]
    found = Study([number_of(number)], features(table)).run(OPTIONS)["properties"]["mass"]["sources"]["trained"]
    assert found["choice"] == PLANTED
    assert found["test"] < 0.6


def test_scores_do_not_depend_on_other_properties_or_on_the_order_of_items() -> None:
    number, classes = truth()
    table = planted(number)
    order = np.random.default_rng(3).permutation(ITEMS)
    shuffled = features(table[order], [IDS[place] for place in order])
    alone = Study([number_of(number)], shuffled).run(OPTIONS)["properties"]["mass"]
    beside = Study([classes_of(classes), number_of(number)], features(table)).run(OPTIONS)["properties"]["mass"]
    assert alone["sources"]["trained"]["choice"] == beside["sources"]["trained"]["choice"]
    assert alone["sources"]["trained"]["test"] == pytest.approx(beside["sources"]["trained"]["test"], abs=0.02)


def test_probes_are_those_of_scikit_learn() -> None:
    from sklearn.linear_model import RidgeCV
    from sklearn.metrics import r2_score
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    number, _ = truth()
    x = planted(0.3 * number)[:, PLANTED]
    x[:, 3] = 7  # a constant feature
    pipe = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 6, 17)))
    crossed = cross_val_predict(pipe, x, number, cv=KFold(5, shuffle=True, random_state=0))
    assert cross_validate("ridge", x, number, 0)[0] == pytest.approx(r2_score(number, crossed), abs=1e-6)
    fitted = pipe.fit(x[:400], number[:400]).predict(x[400:])
    assert np.abs(predict("ridge", x[:400], number[:400], x[400:]) - fitted).max() < 1e-6
    assert score("ridge", number[400:], fitted) == pytest.approx(r2_score(number[400:], fitted))


def test_more_labels_and_later_checkpoints_help_where_the_signal_grows() -> None:
    number, _ = truth()
    steps = {f"{step}": features(planted(number * share)) for step, share in ((10, 0.02), (100, 0.2), (1000, 1))}
    options = StudyOptions(draws=50, label_counts=(32, 400, 10**6), repeats=3)
    one = Study([number_of(number)], features(planted(0.3 * number)), checkpoints=steps).run(options)["properties"][
        "mass"
    ]
    assert [point["labels"] for point in one["labels"]] == [32, 400]  # there are fewer than a million labels
    few, many = (np.mean(point["scores"]["trained"]) for point in one["labels"])
    assert many > few + 0.05
    scores = [facts["test"] for facts in one["checkpoints"].values()]
    assert scores == sorted(scores)
    assert scores[-1] > scores[0] + 0.5


def test_a_rare_class_stops_nothing() -> None:
    """With two items of a class, some folds and some draws of few labels contain none."""
    classes = np.zeros(ITEMS, dtype=np.int64)
    classes[[np.flatnonzero([not is_test(name, OPTIONS) for name in IDS])[:2]]] = 1
    one = Property("rare", "logistic", IDS, classes, ("a", "b"))
    options = StudyOptions(draws=20, label_counts=(30,), repeats=3)
    found = Study([one], features(planted(classes.astype(float))[:, :1])).run(options)["properties"]["rare"]
    assert found["sources"]["trained"]["test"] == found["most_frequent"] == 1


def test_the_inputs_are_a_baseline_of_components() -> None:
    """A property of the pixels is found in their components; one that no component carries is not."""
    number, _ = truth()
    rng = np.random.default_rng(5)
    pixels = rng.normal(size=(ITEMS, 50))
    pixels[:, 7:20] += 3 * number[:, None]
    inputs = RawInputs(Path("pixels.npy"), IDS, None, features(pixels[:, None]))
    noise = features(planted(np.zeros(ITEMS)))
    properties = [number_of(number), Property("other", "ridge", IDS, rng.normal(size=ITEMS))]
    report = Study(properties, noise, None, inputs).run(OPTIONS)["properties"]
    assert report["mass"]["sources"]["inputs"]["test"] > 0.9
    assert report["mass"]["trained_minus"]["inputs"]["interval_95"][1] < -0.5
    assert report["other"]["sources"]["inputs"]["test"] < 0.1
    words = ["alpha beta" if value > 0 else "gamma delta" for value in number]
    texts = [f"{word} {rng.integers(9)} omega" for word in words]
    study = Study([number_of(number)], noise, None, RawInputs(Path("texts.jsonl"), IDS, texts, None))
    assert study.run(OPTIONS)["properties"]["mass"]["sources"]["inputs"]["test"] > 0.4


def test_images_are_inputs_as_they_lie_in_their_pair(tmp_path: Path) -> None:
    images = blobs(40, 8)
    brightness = images.mean((1, 2, 3))
    prefix = import_archive(tmp_path, "galaxies", images, ids=np.array(IDS[:40]))
    inputs = read_inputs(Path(prefix))
    assert inputs.ids == IDS[:40]
    assert inputs.arrays is not None
    assert np.array_equal(inputs.arrays.layer(0), images.reshape(40, -1))
    fit, others = inputs.reduced(IDS[:30], IDS[30:40], seed=0)
    assert score("ridge", brightness[30:], predict("ridge", fit, brightness[:30], others)) > 0.9


def write_study(folder: Path) -> list[str]:
    """Write the files of a complete command, with some labels missing; returns its words."""
    number, classes = truth()
    for name, table in (("trained", planted(number)), ("untrained", planted(np.zeros(ITEMS), seed=2))):
        np.save(folder / f"{name}.npy", table[:SMALL, 1:3].astype(np.float32))
        ids = "".join(json.dumps({"id": one}) + "\n" for one in IDS[:SMALL])
        (folder / f"{name}.ids.jsonl").write_text(ids)
        (folder / f"{name}.report.json").write_text(json.dumps({"layers": [1, 2]}))
    rows = ["id,mass,kind"]
    for place, (one, mass, kind) in enumerate(zip(IDS[:SMALL], number, classes, strict=False)):
        rows.append(f"{one},{'' if place % 10 == 0 else mass},{'abc'[kind]}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    words = ["properties", "--trained", "trained.npy", "--untrained", "untrained.npy", "--labels", "labels.csv"]
    words += ["--targets", "mass", "--classes", "kind", "--label-counts", "40", "--repeats", "1"]
    words += ["--checkpoints", "1=untrained.npy", "2=trained.npy", "--draws", "100"]
    return [*words, "--output", "probe.json", "--picture", "probe.png"]


def test_the_command_writes_tables_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(write_study(tmp_path)) == 0
    mass = json.loads(Path("probe.json").read_text())["properties"]["mass"]
    assert mass["without_a_value"] == SMALL // 10
    assert mass["checkpoints"]["2"]["test"] == mass["sources"]["trained"]["test"]
    said = capsys.readouterr().out
    assert f"{mass['sources']['trained']['test']:.3f}" in said
    assert "20 without a value" in said
    assert Path("probe.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--targets": "weight"}, "labels.csv: no column weight; it has id, mass, kind"),
        ({"--targets": "kind"}, "expected a number; for class names use --classes kind"),
        ({"--labels": "none.csv"}, "none.csv: No such file"),
        ({"--labels": "trained.npy"}, "expected a table as .csv"),
        ({"--test-share": "1.5"}, "expected a share between 0 and 1"),
        ({"--test-share": "0.99"}, "items to fit and"),
        ({"--inputs": "few.jsonl"}, "has no input of"),
        ({"--picture": "x.gif"}, "must end in one of .png"),
    ],
)
def test_what_cannot_be_probed_is_one_error(
    change: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = write_study(tmp_path)
    Path("few.jsonl").write_text('{"id": "g1", "text": "a"}\n')
    for name, value in change.items():
        if name in words:
            words[words.index(name) + 1] = value
        else:
            words += [name, value]
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not Path("probe.json").exists()


def test_ids_that_stand_twice_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = write_study(tmp_path)
    with Path("labels.csv").open("a") as file:
        file.write("g1,1,a\n")
    assert main(words) == 2
    assert "the id g1 appears in 2 rows" in capsys.readouterr().err


def test_an_unknown_class_of_a_table_is_left_out(tmp_path: Path) -> None:
    """None, empty and NaN, as a data frame's column with gaps becomes Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    cells = {"id": ["a", "b", "c", "d"], "kind": [1.0, 2.0, float("nan"), None], "name": ["x", "", "y", None]}
    parquet.write_table(pa.table(cells), tmp_path / "truth.parquet")
    kind, name = read_properties(tmp_path / "truth.parquet", (), ("kind", "name"))
    assert (kind.ids, kind.classes) == (["a", "b"], ("1.0", "2.0"))
    assert (name.ids, name.classes) == (["a", "c"], ("x", "y"))
