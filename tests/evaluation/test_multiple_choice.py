"""The program of mcq.py: scores at every layout compared with `transformers`, generated answers, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.evaluation_models import CASE, LAYOUTS, SKY, driven, weights, write_questions
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

CHAT_KEYS = ("chat", "system_prompt", "thinking", "max_thinking_tokens")
FAST = ("tp1", "dp2", "tp2pp2")
PARAMS = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in LAYOUTS]


def _ask(rank: int, world_size: int, export: Path, split: dict[str, int], tests: dict[str, dict[str, Any]]) -> Any:
    """Summaries of several tests in one engine, by name."""
    from megatron.evaluation.multiple_choice.run import ask_and_write
    from megatron.neox_arguments.keys.evaluation import McqKeys

    def program(model: Any, folder: Path) -> dict[str, Any]:
        args, found = model.args, {}
        for name, keys in tests.items():
            chat = {key: value for key, value in keys.items() if key in CHAT_KEYS}
            mcq = McqKeys(**{key: value for key, value in keys.items() if key not in CHAT_KEYS})
            model.args = args.model_copy(update={"mcq": mcq, **chat})
            found[name] = ask_and_write(model, folder)
        return found

    return driven(world_size, export, program, split)


def ask(layout: str, export: Path, tests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    ranks, split = LAYOUTS[layout]
    return run_ranks(_ask, ranks, export, split, tests)[0]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def model() -> Any:
    found = CASE.hugging_face()
    found.load_state_dict(weights())
    return found


def transformers_scores(model: Any, asked: dict[str, Any]) -> list[list[float]]:
    """Log-probability of each continuation token, with every continuation run separately."""
    found = []
    for continuation in asked["continuations"]:
        ids = torch.tensor([asked["prompt_ids"] + continuation])
        with torch.no_grad():
            table = model(ids).logits[0, len(asked["prompt_ids"]) - 1 : -1].log_softmax(-1)
        found.append([float(row[token]) for row, token in zip(table, continuation, strict=True)])
    return found


@pytest.mark.parametrize("layout", PARAMS)
def test_item_scores_equal_transformers(layout: str, export: Path, tmp_path: Path, model: Any) -> None:
    items = str(write_questions(tmp_path / "sky.jsonl"))
    tests = {
        "letter": {"items": items, "topic_field": "topic", "cyclic_orders": True},
        "chat": {"items": items, "chat": True, "thinking": False},
        "text": {"items": items, "method": "text"},
    }
    for name, keys in tests.items():
        keys["output"] = str(tmp_path / name)
    summaries = ask(layout, export, tests)
    for name in tests:
        found = lines(tmp_path / name)
        assert len(found) == len(SKY)
        for item in found:
            for asked in item["asked"]:
                expected = transformers_scores(model, asked)
                worst = max(
                    abs(a - b)
                    for mine, theirs in zip(asked["log_probs"], expected, strict=True)
                    for a, b in zip(mine, theirs, strict=True)
                )
                assert worst < 1e-4
                # The choice follows from the reference's numbers alone, through the order of the options.
                best = max(range(4), key=lambda i: sum(expected[i]))
                assert asked["choice"] == asked["order"][best]
        assert summaries[name]["joined_differently"] == 0
    assert summaries["letter"]["times_asked"] == 4 * len(SKY)
    assert {len(item["asked"]) for item in lines(tmp_path / "letter")} == {4}
    assert summaries["letter"]["topics"].keys() == {"what", "where"}


def test_prompts_have_the_expected_tokens(export: Path, tmp_path: Path, hf_tokenizer: Any) -> None:
    items = str(write_questions(tmp_path / "sky.jsonl"))
    shots = str(write_questions(tmp_path / "shots.jsonl"))
    Path(shots).write_text(Path(shots).read_text().replace("Messier", "NGC"))
    think = {"max_thinking_tokens": 24, "max_answer_tokens": 12, "method": "generate", "chat": True}
    tests: dict[str, dict[str, Any]] = {
        "plain": {"items": items, "shots": 1, "shots_file": shots, "limit": 2},
        "chat": {"items": items, "chat": True, "thinking": False, "system_prompt": "Be brief.", "limit": 1},
        "on": {"items": items, "thinking": True, "limit": 1, **think},
        "off": {"items": items, "thinking": False, "limit": 1, **think},
        "withheld": {"items": str(write_questions(tmp_path / "withheld.jsonl", answers=False)), "limit": 5},
    }
    for name, keys in tests.items():
        keys["output"] = str(tmp_path / name)
    summaries = ask("tp1", export, tests)

    plain = lines(tmp_path / "plain")[0]["asked"][0]
    text = hf_tokenizer.decode(plain["prompt_ids"])
    assert text == (
        "<|begin_of_text|>Question: Which constellation contains NGC 44?\nA. Cancer\nB. Tucana\nC. Scorpius\n"
        "D. Coma Berenices\nAnswer: A\n\nQuestion: Which constellation contains Messier 44?\nA. Cancer\nB. Tucana\n"
        "C. Scorpius\nD. Coma Berenices\nAnswer:"
    )
    assert plain["prompt_ids"].count(hf_tokenizer.bos) == 1
    assert [hf_tokenizer.decode(ids) for ids in plain["continuations"]] == [" A", " B", " C", " D"]

    chat = lines(tmp_path / "chat")[0]["asked"][0]
    text = hf_tokenizer.decode(chat["prompt_ids"])
    assert text.startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ndetailed thinking off\n\nBe brief.<|eot_id|>"
    )
    assert text.endswith('<|start_header_id|>assistant<|end_header_id|>\n\n{"ANSWER": "')
    assert [hf_tokenizer.decode(ids) for ids in chat["continuations"]] == list("ABCD")

    on = lines(tmp_path / "on")[0]["asked"][0]
    text = hf_tokenizer.decode(on["prompt_ids"])
    assert text.endswith("<|end_header_id|>\n\n<think>\n")
    assert "detailed thinking on<|eot_id|>" in text
    assert on["thinking"] == "cut"
    assert "\n</think>\n\n" in on["generated"]  # the budget was spent, and an answer followed
    assert len(on["generated_ids"]) <= 24 + 12 + len(hf_tokenizer.encode("\n</think>\n\n"))
    assert "thinking" not in lines(tmp_path / "off")[0]["asked"][0]
    assert summaries["on"]["thinking"] == {"cut": 1}
    assert summaries["off"]["unparsed_items"] + sum(summaries["off"]["chosen_letters"].values()) == 1

    rows = (tmp_path / "withheld" / "submission.csv").read_text().splitlines()
    assert rows[0] == "id,answer"
    assert [row.split(",")[0] for row in rows[1:]] == ["0", "1", "2", "3", "4"]
    assert all(row.split(",")[1] in "ABCD" for row in rows[1:])
    assert "accuracy" not in summaries["withheld"]


def test_generated_answers_equal_transformers(export: Path, tmp_path: Path, model: Any) -> None:
    items = str(write_questions(tmp_path / "sky.jsonl"))
    keys = {"items": items, "method": "generate", "chat": True, "max_answer_tokens": 12, "limit": 3}
    ask("tp2pp2", export, {"a": {**keys, "output": str(tmp_path / "a")}})
    for item in lines(tmp_path / "a"):
        (asked,) = item["asked"]
        ids = torch.tensor([asked["prompt_ids"]])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None
        )[0, ids.shape[1] :]
        assert asked["generated_ids"] == expected[: len(asked["generated_ids"])].tolist()


def test_two_checkpoints_are_compared_on_the_same_items(export: Path, tmp_path: Path) -> None:
    items = str(write_questions(tmp_path / "sky.jsonl", copies=3))
    first, second = tmp_path / "first", tmp_path / "second"
    ask("tp1", export, {"first": {"items": items, "output": str(first)}})
    before = lines(first)
    for item in before:
        item["correct"] = item["id"] < 20  # what another checkpoint might have got right
    (first / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in before))
    keys = {"items": items, "output": str(second), "compare_with": str(first / "items.jsonl")}
    found = ask("dp2", export, {"second": keys})["second"]["comparison"]
    now = {item["id"]: item["correct"] for item in lines(second)}
    assert found["lost"] == sum(not now[i] for i in range(20))
    assert found["gained"] == sum(now[i] for i in range(20, 24))
    assert found["correct_now"] - found["correct_before"] == found["gained"] - found["lost"]


def _bad(rank: int, world_size: int, export: Path, split: dict[str, int], keys: dict[str, Any]) -> str:
    from megatron.common.errors import UserError

    with pytest.raises(UserError) as caught:
        _ask(rank, world_size, export, split, {"x": keys})
    return str(caught.value)


def test_an_error_on_rank_0_reaches_every_rank(export: Path, tmp_path: Path) -> None:
    items = str(write_questions(tmp_path / "sky.jsonl"))
    ranks, split = LAYOUTS["tp2pp2"]
    keys = {"items": items, "shots": 8, "shots_file": items, "output": str(tmp_path / "x")}
    found = run_ranks(_bad, ranks, export, split, keys)
    assert len(set(found)) == 1
    assert "has 0 questions with an answer that are not asked themselves" in found[0]
