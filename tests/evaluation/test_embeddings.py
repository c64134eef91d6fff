"""Vectors of texts equal the hidden states of `transformers` at every layout, independent of the rest of the batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest

from megatron.neox_arguments.keys.embeddings import EmbedKeys
from tests.support.evaluation_models import CASE, LAYOUTS, SKY, driven, hidden_states
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

# Of 2 to about 200 tokens, so that several padded lengths and several micro-batches are needed.
TEXTS = [
    "x",
    *(row[0] for row in SKY),
    "M☉ and Messier 31.",
    " ".join(" ".join(row) for row in SKY[:3]),
    " ".join(" ".join(row) for row in SKY[2:7]),
]
RUNS: dict[str, dict[str, Any]] = {
    "all": {"layers": "all"},
    "last": {"layers": [0, 1, -1], "pooling": "last"},
    "first layer": {"layers": 1, "l2": True},
    "embedding": {"layers": 0},
}


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": f"t{n}", "text": text}) + "\n" for n, text in enumerate(texts)))
    return path


def _embed(rank: int, world_size: int, export: Path, split: dict[str, int], runs: dict[str, dict[str, Any]]) -> Any:
    """`embed_and_write` with each run's keys in one engine; `micro_batch` among them sets that."""
    from megatron.evaluation.embeddings.run import embed_and_write

    def program(model: Any, folder: Path) -> dict[str, Any]:
        args, reports = model.args, {}
        for name, keys in runs.items():
            model.args = args.model_copy(update={"embed": EmbedKeys(**keys)})
            reports[name] = embed_and_write(model, folder)
        return reports

    return driven(world_size, export, program, split)


def embedded(layout: str, export: Path, folder: Path, runs: dict[str, dict[str, Any]]) -> dict[str, np.ndarray]:
    folder.mkdir()
    given = {name: {**keys, "output": str(folder / f"{name}.npy")} for name, keys in runs.items()}
    ranks, split = LAYOUTS[layout]
    run_ranks(_embed, ranks, export, split, given)
    return {name: np.load(folder / f"{name}.npy") for name in runs}


@pytest.mark.parametrize(
    "layout",
    ["dp2", "tp2pp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tp1", "tp2", "pp2"))],
)
def test_vectors_equal_transformers(layout: str, export: Path, tmp_path: Path, hf_tokenizer: Any) -> None:
    forward, backward = write_texts(tmp_path / "a.jsonl", TEXTS), write_texts(tmp_path / "b.jsonl", TEXTS[::-1])
    runs = {name: {**keys, "input": str(forward)} for name, keys in RUNS.items()}
    runs["reversed"] = {"layers": "all", "input": str(backward)}
    runs["alone"] = {"layers": "all", "input": str(write_texts(tmp_path / "c.jsonl", TEXTS[3:4]))}
    found = embedded(layout, export, tmp_path / "out", runs)
    states = hidden_states(hf_tokenizer, TEXTS)
    means = np.stack([one[:, 1:].mean(1) for one in states])  # without the begin-of-text token
    assert np.abs(found["all"] - means).max() < 1e-5
    assert np.abs(found["last"] - np.stack([one[:, -1] for one in states])).max() < 1e-5
    unit = means[:, 1] / np.linalg.norm(means[:, 1], axis=1, keepdims=True)
    assert np.abs(found["first layer"] - unit).max() < 1e-5
    assert np.abs(found["embedding"] - means[:, 0]).max() < 1e-5
    assert np.abs(found["reversed"][::-1] - found["all"]).max() < 1e-6
    assert np.abs(found["alone"][0] - found["all"][3]).max() < 1e-6
    # Sensitivity of the limits: a missing begin-of-text token, or padding to the next text's length, would be detected.
    assert np.abs(np.stack([one.mean(1) for one in states]) - means).max() > 1e-3


def _interrupted(rank: int, world_size: int, export: Path, folder: Path) -> list[str]:
    """Runs that end in the middle of the third window, and then resume."""
    from megatron.evaluation.embeddings import run

    run.WINDOW = 4  # several windows in a few texts

    def program(model: Any, checkpoint: Path) -> list[str]:
        said = []
        for suffix in (".npy", ".parquet"):
            args = model.args
            keys = {"input": str(folder / "a.jsonl"), "layers": [1, 2]}
            model.args = args.model_copy(update={"embed": EmbedKeys(**keys, output=str(folder / f"whole{suffix}"))})
            run.embed_and_write(model, checkpoint)
            model.args = args.model_copy(update={"embed": EmbedKeys(**keys, output=str(folder / f"killed{suffix}"))})
            put = run.VectorFile.put

            def put_until(file: Any, row: int, vectors: np.ndarray, put: Any = put) -> None:
                if row == 9:
                    raise KeyboardInterrupt
                put(file, row, vectors)

            run.VectorFile.put = put_until  # type: ignore[method-assign]
            with pytest.raises(KeyboardInterrupt):
                run.embed_and_write(model, checkpoint)
            run.VectorFile.put = put  # type: ignore[method-assign]
            other = model.args.embed.model_copy(update={"pooling": "last"})
            model.args = model.args.model_copy(update={"embed": other})
            said.append(_error(run.embed_and_write, model, checkpoint))
            model.args = args.model_copy(update={"embed": EmbedKeys(**keys, output=str(folder / f"killed{suffix}"))})
            embed, calls = model.embed, []
            model.embed = lambda *given, embed=embed, calls=calls: (calls.append(len(given[0])), embed(*given))[1]
            run.embed_and_write(model, checkpoint)
            assert sum(calls) == len(TEXTS) - 8  # two windows were whole
            said.append(_error(run.embed_and_write, model, checkpoint))
            model.args, model.embed = args, embed
        return said

    found: list[str] = driven(world_size, export, program, {})
    return found


def _error(function: Any, *given: Any) -> str:
    from megatron.common.errors import UserError

    with pytest.raises(UserError) as caught:
        function(*given)
    return str(caught.value)


def test_a_killed_run_resumes_where_it_stopped(export: Path, tmp_path: Path) -> None:
    write_texts(tmp_path / "a.jsonl", TEXTS)
    said = run_ranks(_interrupted, 1, export, tmp_path)[0]
    for other, complete in (said[:2], said[2:]):
        assert "is of another run: pooling was mean, now last" in other
        assert "already exists and is complete" in complete
    for name in ("npy", "ids.jsonl", "parquet"):
        whole = (tmp_path / f"whole.{name}").read_bytes()
        assert whole == (tmp_path / f"killed.{name}").read_bytes()
    assert [json.loads(line)["id"] for line in (tmp_path / "whole.ids.jsonl").open()] == [
        f"t{n}" for n in range(len(TEXTS))
    ]
    assert not list(tmp_path.glob("*.partial*"))
    table = parquet.read_table(tmp_path / "killed.parquet")
    assert table.column_names == ["id", "tokens", "cut", "layer_1", "layer_2"]
    vectors = np.load(tmp_path / "whole.npy")
    assert vectors.shape == (len(TEXTS), 2, CASE.hidden)
    assert np.array_equal(np.stack(table["layer_2"].to_numpy()), vectors[:, 1])


BAD = [
    b'{"id": "a", "text": "A star."}\n',
    b'{"id": "b", "text": "A st\n',
    b"\n",
    b'{"id": "c"}\n',
    b'["d"]\n',
    b'{"id": "e", "text": 3}\n',
    b'{"id": "f", "text": " "}\n',
    b'{"id": null, "text": "No id."}\n',
    b'{"id": 1, "text": "A star\\u2013planet system."}\n',
    b'{"id": "g", "text": "\xff"}\n',
    json.dumps({"id": "long", "text": "Messier " * 400}).encode(),
]


def _bad_records(rank: int, world_size: int, export: Path, split: dict[str, int], folder: Path) -> Any:
    from megatron.evaluation.embeddings.run import embed_and_write

    def program(model: Any, checkpoint: Path) -> Any:
        args = model.args
        keys = {"input": str(folder / "a.jsonl"), "output": str(folder / "a.npy")}

        def run(**more: Any) -> Any:
            model.args = args.model_copy(update={"embed": EmbedKeys(**{**keys, **more})})
            return embed_and_write(model, checkpoint)

        stopped = _error(run)
        assert not list(folder.glob("a.npy*"))
        report = run(on_bad_record="skip")
        cut = run(on_bad_record="skip", cut_long_texts=True, output=str(folder / "cut.npy"))
        return stopped, report, cut

    return driven(world_size, export, program, split)


def test_bad_records_are_named_and_counted(export: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(BAD))
    stopped, report, cut = run_ranks(_bad_records, 1, export, {}, tmp_path)[0]
    assert "a.jsonl, line 2: not JSON" in stopped
    assert "embed.on_bad_record: skip leaves such records out" in stopped
    assert report["rows"] == 2
    assert report["left_out"] == {
        "not JSON": 2,
        "no text": 2,
        "text is not text": 1,
        "empty text": 1,
        "bad id": 1,
        "too long": 1,
    }
    assert len(report["named"]) == 8
    assert [json.loads(line)["id"] for line in (tmp_path / "a.ids.jsonl").open()] == ["a", 1]
    assert (cut["rows"], cut["cut"]) == (3, 1)
    assert json.loads((tmp_path / "cut.ids.jsonl").read_text().splitlines()[-1]) == {
        "id": "long",
        "tokens": CASE.seq,
        "cut": True,
    }
