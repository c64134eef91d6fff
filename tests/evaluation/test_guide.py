"""Every command of docs/evaluation.md, on a converted checkpoint at TP2 x PP2, through deepy.py."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron.neox_arguments.registry import Task
from tests.support.documentation import ROOT, documented_commands
from tests.support.evaluation_models import CASE, SKY, run_from, weights, write_guide_inputs, write_questions

pytestmark = pytest.mark.distributed
GUIDE = "docs/evaluation.md"
LONGER = replace(CASE, seq=512)  # a conversation, its reasoning and the answer
TASK = {
    "task": "sky_letters",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\nAnswer:",
    "doc_to_choice": ["A", "B", "C", "D"],
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vocab_folder: Path) -> Path:
    """A working directory with the files used in the guide."""
    place = tmp_path_factory.mktemp("guide")
    write_guide_inputs(place, vocab_folder, LONGER)
    write_questions(place / "questions.jsonl")
    (place / "papers.jsonl").write_text('{"text": "A star."}\n{"text": "Two stars.", "source": "b"}\n')
    (place / "tasks").mkdir()
    (place / "tasks" / "sky_letters.yaml").write_text(yaml.safe_dump(TASK))
    (place / "docs").symlink_to(ROOT / "docs")
    return place


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return run_from(folder, command, HF_DATASETS_OFFLINE="1")


@pytest.mark.slow
def test_all_commands_of_the_guide(folder: Path) -> None:
    commands = documented_commands(GUIDE)
    assert len(commands) == 6
    for command in commands:
        if "eval_tasks" in command and find_spec("lm_eval") is None:
            continue
        done = run(command, folder)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    again = json.loads((folder / "results/again/summary.json").read_text())
    assert again["comparison"]["gained"] == again["comparison"]["lost"] == 0
    assert set(json.loads((folder / "results/papers_eval_results.json").read_text())["documents"]) == {"papers", "b"}
    assert (folder / "figure3.svg").stat().st_size > 1000
    if find_spec("lm_eval") is not None:
        report = json.loads((folder / "results/tasks_eval_results.json").read_text())
        letter = json.loads((folder / "results/letter/summary.json").read_text())
        assert report["wilson"]["sky_letters"]["correct"] == letter["correct"]


def test_scores_of_the_first_command_match_the_export(folder: Path) -> None:
    """Scores by deepy.py at TP2 x PP2 from the converted checkpoint equal those of `transformers` on its source."""
    done = run(documented_commands(GUIDE)[0], folder)
    assert done.returncode == 0, done.stderr
    assert "accuracy " in done.stdout
    model = CASE.hugging_face()
    model.load_state_dict(weights())
    lines = (folder / "results/letter/items.jsonl").read_text().splitlines()
    assert len(lines) == len(SKY)
    for line in lines:
        (asked,) = json.loads(line)["asked"]
        with torch.no_grad():
            row = model(torch.tensor([asked["prompt_ids"]])).logits[0, -1].log_softmax(-1)
        found = [log_probs[0] for log_probs in asked["log_probs"]]
        assert found == pytest.approx([float(row[ids[0]]) for ids in asked["continuations"]], abs=1e-4)


def test_bad_input_is_one_error_and_exit_code_2(folder: Path) -> None:
    (folder / "bad.jsonl").write_text('{"question": "q", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "E"}\n')
    command = "python deepy.py mcq.py model.yml local.yml --load checkpoints --mcq.items bad.jsonl --mcq.output bad"
    done = run(command, folder)
    assert done.returncode == 2
    assert done.stderr.count("answer 'E' is not one of ABCD") == 1
    assert not (folder / "bad" / "items.jsonl").exists()


def test_missing_inputs_are_named_before_ranks_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.neox_arguments import NeoXArgs
    from megatron.preflight.run_inputs import input_problems

    def problems(task: Task, **keys: Any) -> list[str]:
        files = [folder / "model.yml", folder / "local.yml"]
        return input_problems(NeoXArgs.from_ymls(files, {"load": "checkpoints", **keys}, task=task))

    monkeypatch.chdir(folder)
    asked = {"items": "questions.jsonl", "output": "results/x"}
    assert problems("mcq", mcq=asked) == []
    assert problems("mcq", mcq={**asked, "items": "none.jsonl"}) == ["none.jsonl: No such file or directory"]
    assert problems("mcq", mcq={**asked, "compare_with": "none"}) == ["mcq.compare_with: none is not there"]
    assert problems("eval", eval_documents=["papers.jsonl"]) == []
    assert problems("eval", eval_documents=["none"]) == ["eval_documents: none.idx is not there"]
    unused = {"eval_documents": ["papers.jsonl"], "eval_task_path": "none"}
    assert problems("eval", **unused) == ["eval_task_path: none is not a folder"]
