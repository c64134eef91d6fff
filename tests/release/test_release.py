"""A release is verified on another machine: training steps are reread, and every difference is reported."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.support.data_commands import preprocess, preprocess_chats
from tests.support.hf_folders import Model, write_hf
from tests.support.models import Case
from tests.support.ranks import run_ranks
from tests.support.runs import run_case
from tests.support.vocabulary import VOCAB_SIZE, real_texts
from tools.release.cli import main
from tools.release.hashes import sealed
from tools.release.steps import StepReader

pytestmark = pytest.mark.distributed

CASE = Case(heads=2, kv_heads=2, head_dim=8, layers=1, intermediate=16, vocab=VOCAB_SIZE, seq=32)


def _train(rank: int, world_size: int, stages: list[dict[str, Any]], out: str) -> None:
    """Train the stages and record every batch given to the engine."""
    from megatron.core import parallel_state

    from megatron.trainer.run import Run

    class Recorded(Run):
        def set_up(self) -> None:
            super().set_up()
            self.read: list[dict[str, torch.Tensor]] = []
            given = self.batches._micro_batches
            assert given is not None
            self.batches._micro_batches = (self.read.append(batch) or batch for batch in given)  # type: ignore[func-returns-value]

    for number, keys in enumerate(stages):
        run = run_case(CASE, world_size, keys, Recorded)
        assert isinstance(run, Recorded)
        torch.save([{k: b[k] for k in ("tokens", "labels")} for b in run.read], f"{out}/read{number}.pt")
        parallel_state.destroy_model_parallel()


@pytest.fixture(scope="module")
def folder(vocab_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, two stages trained on them, and the recipe of a release with two shards of weights."""
    out = tmp_path_factory.mktemp("release")
    texts = [text[:300] for text in real_texts()]
    for name, part in (("domain", texts[:24]), ("general", texts[24:60])):
        (out / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        options = {"prepend_bos": True, "append_eod": True}
        assert preprocess(vocab_folder, out / f"data/{name}", out / f"{name}.jsonl", **options) == 0
    chats = [{"prompt": f"What is {n}?", "completion": f"{n} it is"} for n in range(60)]
    (out / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    assert preprocess_chats(vocab_folder, out / "data/sft", f"chats={out}/chats.jsonl") == 0
    common = {
        "vocab_file": str(vocab_folder / "tokenizer.json"),
        "checkpoint_factor": 1000,
        "train_iters": None,
        "gradient_accumulation_steps": 2,
        "warmup": 0.1,
    }
    stages = [
        {
            **common,
            "train_data_paths": [
                f"{out}/data/domain_text_document",
                {"path": f"{out}/data/general_text_document", "replay": {"share": 0.2, "fresh_each_epoch": True}},
            ],
            "train_epochs": 2.5,
            "skip_sample_ranges": [[8, 14]],
            "save": f"{out}/cpt",
            "log_dir": f"{out}/logs/cpt",
        },
        {
            **common,
            "train_data_paths": [f"{out}/data/sft_chats_document"],
            "train_label_data_paths": [f"{out}/data/sft_chats_label_document"],
            "pack_impl": "best_fit",
            "isolate_documents": True,
            "train_epochs": 1.6,
            "load": f"{out}/cpt",
            "from_scratch": False,
            "finetune": True,
            "allow_high_initial_loss": True,
            "save": f"{out}/sft",
            "log_dir": f"{out}/logs/sft",
        },
    ]
    run_ranks(_train, 1, stages, str(out))
    write_hf(out / "hf", Model(), shards=2)
    shutil.copyfile(vocab_folder / "tokenizer.json", out / "hf/tokenizer.json")
    summary = {
        **{"n": 8, "correct": 6, "accuracy": 0.75, "wilson_95": [0.41, 0.93], "topics": {}, "precision": "fp32"},
        **{"protocol": {"method": "letter"}, "questions": {"file": "q.jsonl", "sha256": "0" * 64}},
    }
    (out / "summary.json").write_text(json.dumps(summary))
    recipe = {
        "name": "Llama-Test",
        "license": "llama3.1",
        "base_models": ["meta-llama/Llama-3.1-8B"],
        "model": f"{out}/hf",
        "stages": [{"name": "cpt", "checkpoint": f"{out}/cpt"}, {"name": "sft", "checkpoint": f"{out}/sft"}],
        "data": {"domain": {"license": "PSF-2.0", "origin": "Python's topics"}},
        "evaluation": [{"name": "a test", "summary": f"{out}/summary.json"}],
        "limitations": "It is a test.",
    }
    (out / "release.yml").write_text(yaml.safe_dump(recipe))
    assert main(["make", str(out / "release.yml"), "--output", str(out / "made")]) == 0
    return out


@pytest.fixture
def release(folder: Path, tmp_path: Path) -> Path:
    """Copies of the release and its data, without any of the original folders."""
    shutil.copytree(folder / "made", tmp_path / "made")
    (tmp_path / "elsewhere").mkdir()
    for file in (folder / "data").iterdir():
        if file.suffix in (".bin", ".idx", ".json"):
            shutil.copyfile(file, tmp_path / "elsewhere" / file.name)
    return tmp_path / "made"


def verify(release: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["verify", str(release), "--data", str(release.parent / "elsewhere"), *more])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_everything_is_found_elsewhere(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = verify(release, capsys, "--steps", "1000")
    assert code == 0, said
    assert "4 of 4 data sources found and compared" in said
    provenance = json.loads((release / "provenance.json").read_text())
    for stage in provenance["stages"]:
        assert f"stage {stage['name']}: {len(stage['steps'])} of {len(stage['steps'])} recorded steps" in said
        assert len(stage["steps"]) == stage["checkpoint"]["iteration"] > 10
    card = (release / "README.md").read_text()
    assert card.startswith("---\nlicense: llama3.1\nbase_model:\n- meta-llama/Llama-3.1-8B\n---")
    for words in ("Built with Llama", "75.0 %", "41.0 to 93.0", "PSF-2.0", "It is a test.", "train_epochs | 2.5"):
        assert words in card
    assert str(release.parent) not in (release / "provenance.json").read_text()


def test_ten_steps_are_those_that_were_trained_on(folder: Path, release: Path, vocab_folder: Path) -> None:
    """Against the batches that the engine was given, and documents against megatron-core's reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    stages = json.loads((release / "provenance.json").read_text())["stages"]
    chance = random.Random(0)
    bos = json.loads((release / "tokenizer.json").read_text())["added_tokens"][0]["id"]
    for number, stage in enumerate(stages):
        prefixes = {name: release.parent / "elsewhere" / name for name in stage["sources"]}
        reader = StepReader(stage["config"], stage["batch"], stage["train_iters"], prefixes, release / "tokenizer.json")
        read = torch.load(folder / f"read{number}.pt")
        files = {name: IndexedDataset(str(prefix)) for name, prefix in prefixes.items()}
        steps = sorted(chance.sample(range(1, stage["checkpoint"]["iteration"] + 1), 5))
        for n in steps:
            step = reader.step(n)
            given = read[2 * (n - 1) : 2 * n]  # micro-batches
            for key in ("tokens", "labels"):
                assert np.array_equal(getattr(step, key), torch.cat([batch[key] for batch in given]).numpy()), (n, key)
            for tokens, names in zip(step.tokens, step.documents, strict=True):
                edges = [0, *(int(at) for at in np.flatnonzero(tokens == bos) if at), len(tokens)]
                segments = [tokens[a:b] for a, b in pairwise(edges)]
                for segment, name in zip(segments, names, strict=False):
                    source, document = name.split(":")
                    words = files[source][int(document)]
                    text, part = bytes(np.asarray(words, "<i8")), bytes(segment[: len(words)].astype("<i8"))
                    assert part in text, name


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_changed_byte_in_any_file_is_named(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [*release.iterdir(), *(release.parent / "elsewhere").iterdir()]
    assert len(files) > 15
    for file in files:
        if file.is_dir():
            continue
        before = file.read_bytes()
        _flip(file)
        try:
            code, said = verify(release, capsys, "--steps", "1")
            assert code in (1, 2), file
            assert file.name in said, (file, said)
        finally:
            file.write_bytes(before)
    assert verify(release, capsys, "--steps", "1")[0] == 0


def _swap(one: Path, two: Path) -> None:
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)


def _shards(release: Path) -> None:
    _swap(*sorted(release.glob("model-*.safetensors")))


def _missing_shard(release: Path) -> None:
    sorted(release.glob("model-*.safetensors"))[0].unlink()


def _foreign(release: Path) -> None:
    (release / "extra.bin").write_bytes(b"x")


def _missing_source(release: Path) -> None:
    (release.parent / "elsewhere/general_text_document.bin").unlink()


def _swapped_sources(release: Path) -> None:
    data = release.parent / "elsewhere"
    _swap(data / "general_text_document.bin", data / "domain_text_document.bin")


def _other_recorded_step(release: Path) -> None:
    """A valid provenance with step records that do not match the data."""
    path = release / "provenance.json"
    content = json.loads(path.read_text())
    del content["digest"]
    steps = content["stages"][0]["steps"]
    steps[3]["ids"] = steps[4]["ids"]
    steps[5]["documents"] = steps[4]["documents"]
    path.write_text(sealed(content))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            _shards,
            [
                "00001-of-00002.safetensors has the content of model-00002-of-00002",
                "00002-of-00002.safetensors has the content of",
            ],
        ),
        (_missing_shard, ["model-00001-of-00002.safetensors is missing"]),
        (_foreign, ["extra.bin is not a file of the release"]),
        (
            _missing_source,
            ["general_text_document.bin is missing", "not reread, missing general_text_document"],
        ),
        (_swapped_sources, ["general_text_document.bin has the content of domain_text_document.bin"]),
        (_other_recorded_step, ["stage cpt, step 4: its token ids", "stage cpt, step 6: its documents"]),
    ],
)
def test_problems_are_reported(
    release: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], said: list[str]
) -> None:
    damage(release)
    code, text = verify(release, capsys, "--steps", "1000")
    assert code == 1
    for words in said:
        assert words in text, text


def test_a_step_is_shown(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(release.parent / "elsewhere")]
    assert main(["step", str(release), "--stage", "cpt", "--step", "3", *data]) == 0
    said = capsys.readouterr().out
    assert "text_document:" in said
    assert said.rstrip().endswith("as recorded")
    assert main(["step", str(release), "--stage", "cpt", "--step", "99999", *data]) == 2
    assert "stage cpt has steps 1 to" in capsys.readouterr().err
    assert main(["step", str(release), "--stage", "dpo", "--step", "1", *data]) == 2
    assert "there is no stage dpo; the release has cpt, sft" in capsys.readouterr().err


def test_a_step_needs_the_data_of_its_own_stage_only(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder is named after a source of the stage, as is the line about the other stage's missing data."""
    here = release.parent / "domain_text_document"
    (release.parent / "elsewhere").rename(here)
    content = json.loads((release / "provenance.json").read_text())
    cpt = next(stage for stage in content["stages"] if stage["name"] == "cpt")
    assert "domain_text_document" in cpt["sources"]
    for source in set(content["data"]) - set(cpt["sources"]):
        for file in content["data"][source]["files"]:
            (here / file).unlink()
    words = ["step", str(release), "--step", "3", "--data", str(here)]
    assert main([*words, "--stage", "cpt"]) == 0
    assert main([*words, "--stage", "sft"]) == 2
    assert "is missing in" in capsys.readouterr().err


def test_a_run_whose_batch_changed_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Smaller or larger than that of the last steps."""
    path = folder / "logs/sft/metrics.jsonl"
    before = path.read_text()
    records = [json.loads(line) for line in before.splitlines()]
    for change in (-1, 1):
        changed = [dict(record) for record in records]
        for record in changed:
            if record.get("iteration", 0) >= 3 and "train/consumed_samples" in record:
                record["train/consumed_samples"] += change
        path.write_text("".join(json.dumps(record) + "\n" for record in changed))
        try:
            only = [{"name": "sft", "checkpoint": f"{folder}/sft"}]
            assert main(_written(folder, tmp_path, stages=only)) == 2
        finally:
            path.write_text(before)
        assert "step 3 of stage sft read" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def _written(folder: Path, tmp_path: Path, **changes: Any) -> list[str]:
    recipe = yaml.safe_load((folder / "release.yml").read_text()) | changes
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump({key: value for key, value in recipe.items() if value is not None}))
    return ["make", str(path), "--output", str(tmp_path / "out")]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"limitations": None}, "limitations: Field required"),
        ({"sources": 3}, "sources: Extra inputs"),
        ({"model": "/nowhere"}, "/nowhere is not a folder"),
        ({"data": {"astronomy": {"license": "x"}}}, "no stage reads astronomy; sources are domain_text_document"),
        ({"stages": [{"name": "cpt", "checkpoint": "/nowhere"}]}, "/nowhere is not a folder"),
        ({"merge": "/nowhere"}, "/nowhere has no merge.yml"),
    ],
)
def test_bad_recipes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    assert main(_written(folder, tmp_path, **changes)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("tools/release: ")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yml"], "nothing is left behind"


def test_steps_can_be_sampled(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_written(folder, tmp_path, record_steps=3)) == 0
    said = capsys.readouterr().out
    assert "stage cpt: 3 of" in said
    assert "warning: no license is given for general_text_document" in said
    assert main(_written(folder, tmp_path)) == 2
    assert "exists; a release is written once" in capsys.readouterr().err
