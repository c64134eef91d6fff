"""lm-eval on the ranks, compared with its own `hf` backend on the export: same scored ids, same results."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.evaluation_models import LAYOUTS, SKY, driven, write_questions
from tests.support.ranks import run_ranks
from tests.support.requirements import need

pytestmark = pytest.mark.distributed

TASKS = ["sky_letters", "sky_texts", "sky_rolling", "sky_generated"]
LONG = " ".join(question + " " + " ".join(options) for question, *options in SKY)


@pytest.fixture(scope="module", autouse=True)
def offline() -> None:
    need("lm-eval", find_spec("lm_eval") is not None, "pip install .[eval]")
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks and their questions; one text is longer than the model's context."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = str(write_questions(folder / "sky.jsonl"))
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in (SKY[0][0], LONG, "x")))
    base = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1.0}}
    asked = {**base, "dataset_kwargs": {"data_files": {"test": questions}}}
    lettered = "Question: {{question}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\nAnswer:"
    made: dict[str, dict[str, Any]] = {
        "sky_letters": {
            **asked,
            "output_type": "multiple_choice",
            "doc_to_text": lettered,
            "doc_to_choice": ["A", "B", "C", "D"],
            "doc_to_target": "answer",
            "fewshot_split": "test",
            "metric_list": [{"metric": "acc"}],
        },
        "sky_texts": {
            **asked,
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "{{[A, B, C, D]}}",
            "doc_to_target": "{{['A','B','C','D'].index(answer)}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "acc_mutual_info"}],
        },
        "sky_rolling": {
            **base,
            "dataset_kwargs": {"data_files": {"test": str(texts)}},
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
        "sky_generated": {
            **asked,
            "output_type": "generate_until",
            "doc_to_text": lettered,
            "doc_to_target": "answer",
            "generation_kwargs": {"until": ["\n", "zz"], "max_gen_toks": 20, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, content in made.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **content}))
    return folder


def _ours(rank: int, world_size: int, export: Path, split: dict[str, int], keys: dict[str, Any]) -> Any:
    from megatron.evaluation.checkpoint import evaluate_texts

    return driven(world_size, export, evaluate_texts, split, **keys)


def ours(export: Path, keys: dict[str, Any], layout: str = "tp2pp2") -> dict[str, Any]:
    ranks, split = LAYOUTS[layout]
    return run_ranks(_ours, ranks, export, split, keys, timeout=240)[0]


def theirs(export: Path, folder: Path, names: list[str], **options: Any) -> tuple[Any, list[Any]]:
    """Results of lm-eval's `hf` backend, and the ids that it scored."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    class Noting(HFLM):
        def _loglikelihood_tokens(self, requests: Any, **keys: Any) -> Any:
            scores = super()._loglikelihood_tokens(requests, **keys)
            noted.extend((c, k, score[0]) for (_, c, k), score in zip(requests, scores, strict=True))
            return scores

    noted: list[Any] = []
    # If the tokenizer adds a begin-of-text token, `hf` by default adds a second one to rolling texts.
    bos = options.pop("add_bos_token", None)
    model = Noting(pretrained=str(export), dtype="float32", batch_size=1, device="cpu", add_bos_token=bos)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0, **options)
    return results, noted


@pytest.fixture(scope="module")
def hf_choices(tasks: Path, export: Path) -> tuple[Any, list[Any]]:
    return theirs(export, tasks, ["sky_letters", "sky_texts", "sky_generated"])


def keys_of(tasks: Path, output: Path, names: list[str], **more: Any) -> dict[str, Any]:
    return {"eval_tasks": names, "eval_task_path": str(tasks), "eval_results_prefix": f"{output}/", **more}


def requests(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "requests.jsonl").read_text().splitlines()]


def assert_same_scores(mine: list[dict[str, Any]], noted: list[Any]) -> None:
    """The same ids in the same order, and sums within 1e-4."""
    assert [(r["context"], r["continuation"]) for r in mine] == [(list(c), list(k)) for c, k, _ in noted]
    assert max(abs(sum(r["log_probs"]) - score) for r, (_, _, score) in zip(mine, noted, strict=True)) < 1e-4


def assert_same_metrics(mine: dict[str, Any], results: Any, names: list[str]) -> None:
    for name in names:
        compared = {m: v for m, v in results["results"][name].items() if "," in m and "stderr" not in m}
        assert compared
        for metric, value in compared.items():
            assert mine["tasks"][name][metric] == pytest.approx(value, rel=1e-4), (name, metric)


def test_four_tasks_equal_the_hf_backend(
    tasks: Path, export: Path, tmp_path: Path, hf_tokenizer: Any, hf_choices: tuple[Any, list[Any]]
) -> None:
    mine = ours(export, keys_of(tasks, tmp_path, TASKS))
    choices, noted = hf_choices
    rolled, noted_rolled = theirs(export, tasks, ["sky_rolling"], add_bos_token=False)
    assert_same_metrics(mine, choices, ["sky_letters", "sky_texts", "sky_generated"])
    assert_same_metrics(mine, rolled, ["sky_rolling"])
    found = requests(tmp_path)
    assert len(found) == len(noted) + len(noted_rolled)
    in_order = sorted(found, key=lambda r: (r["context"], r["continuation"]))
    everything = sorted([*noted, *noted_rolled], key=lambda r: (list(r[0]), list(r[1])))
    assert_same_scores(in_order, everything)
    # Exactly one begin-of-text token, in front; pieces of a long text after the first have none.
    counts = [r["context"].count(hf_tokenizer.bos) for r in found]
    assert counts.count(1) == len(found) - sum(
        len(r["context"]) > 1 and r["context"][0] != hf_tokenizer.bos for r in found
    )
    assert max(counts) == 1
    generated = [json.loads(line) for line in (tmp_path / "samples_sky_generated.jsonl").read_text().splitlines()]
    expected = choices["samples"]["sky_generated"]
    assert [s["resps"] for s in generated] == [s["resps"] for s in expected]
    assert len({str(s["resps"]) for s in generated}) > 1
    assert mine["wilson"]["sky_letters"]["n"] == len(SKY)
    assert mine["requests_cut"] == 0


def _mcq(rank: int, world_size: int, export: Path, split: dict[str, int], keys: dict[str, Any]) -> Any:
    from megatron.evaluation.multiple_choice.run import ask_and_write

    return driven(world_size, export, ask_and_write, split, mcq=keys)


def test_mcq_scores_equal_the_hf_backend(
    tasks: Path, export: Path, tmp_path: Path, hf_choices: tuple[Any, list[Any]]
) -> None:
    """Item by item, lm-eval's `hf` backend scores the same continuations as mcq.py, with the same sums."""
    scored = {(tuple(context), tuple(continuation)): total for context, continuation, total in hf_choices[1]}
    for method in ("letter", "text"):
        ranks, split = LAYOUTS["tp2pp2"]
        output = tmp_path / method
        keys = {"items": str(tasks / "sky.jsonl"), "method": method, "output": str(output)}
        run_ranks(_mcq, ranks, export, split, keys)
        for line in (output / "items.jsonl").read_text().splitlines():
            (asked,) = json.loads(line)["asked"]
            for ids, log_probs in zip(asked["continuations"], asked["log_probs"], strict=True):
                assert sum(log_probs) == pytest.approx(scored[tuple(asked["prompt_ids"]), tuple(ids)], abs=1e-4)


@pytest.mark.slow
def test_few_shot_limit_and_chat_template(tasks: Path, export: Path, tmp_path: Path, hf_tokenizer: Any) -> None:
    names = ["sky_letters"]
    shots = {"eval_num_fewshot": 1, "eval_limit": 4}
    few = ours(export, keys_of(tasks, tmp_path / "few", names, **shots), "tp1")
    results, noted = theirs(export, tasks, names, num_fewshot=1, limit=4)
    assert_same_metrics(few, results, names)
    assert_same_scores(requests(tmp_path / "few"), noted)
    assert len(noted) == 16
    template = {"chat_template": str(export / "tokenizer_config.json"), "eval_apply_chat_template": True}
    chat = ours(export, keys_of(tasks, tmp_path / "chat", names, **template, eval_system_prompt="Be brief."), "dp2")
    results, noted = theirs(
        export, tasks, names, apply_chat_template=True, fewshot_as_multiturn=True, system_instruction="Be brief."
    )
    assert_same_metrics(chat, results, names)
    assert_same_scores(requests(tmp_path / "chat"), noted)
    first = hf_tokenizer.decode(requests(tmp_path / "chat")[0]["context"])
    assert first.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>")


def _unknown(rank: int, world_size: int, export: Path, keys: dict[str, Any]) -> str:
    from megatron.common.errors import UserError

    with pytest.raises(UserError) as caught:
        _ours(rank, world_size, export, {}, keys)
    return str(caught.value)


def test_an_unknown_task_is_named_on_all_ranks(tasks: Path, export: Path, tmp_path: Path) -> None:
    found = run_ranks(_unknown, 2, export, keys_of(tasks, tmp_path, ["sky_leters"]), timeout=240)
    assert found[0] == found[1]
    assert "eval_tasks: sky_leters not among the tasks of" in found[0]
