"""Keys of evaluating a checkpoint: lm-eval's tasks, documents, multiple choice; and their rules."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from megatron.neox_arguments.keys.fields import Keys, key
from megatron.neox_arguments.registry import Registry

if TYPE_CHECKING:
    from megatron.neox_arguments.keys.all_keys import AllKeys

registry = Registry()


class McqKeys(Keys):
    """A multiple-choice test."""

    items: str | None = key(None, "Questions and options: a .jsonl, .csv or .parquet file.", ours=True)
    output: str = key("mcq", "Folder for the results.", ours=True)
    method: Literal["letter", "text", "generate"] = key(
        "letter",
        "How the answer is found. letter: compare the next-token probabilities of the letters; text: compare the "
        "probabilities of the options' texts; generate: read the answer from a generated text.",
        ours=True,
    )
    instruction: str | None = key(None, "Text before the question. Default: one that fits the method.", ours=True)
    prefill: str | None = key(
        None,
        'Beginning of the assistant\'s answer. Default: {"ANSWER": " before a letter, <think> if thinking, else empty.',
        ours=True,
    )
    shots: int = key(0, "Number of examples before each question, without chat.", ge=0, ours=True)
    shots_file: str | None = key(None, "File of examples; its first questions with answers are used.", ours=True)
    text_score: Literal["sum", "calibrated"] = key(
        "sum",
        "Score that decides with method: text. sum: the log-probability of the option; calibrated: that minus its "
        "log-probability after an empty question. Both are reported.",
        ours=True,
    )
    cyclic_orders: bool = key(False, "Ask every question in all cyclic orders of its options.", ours=True)
    max_answer_tokens: int = key(256, "Longest generated answer, in tokens.", gt=0, ours=True)
    question_field: str = key("question", "Column of the question.", ours=True)
    option_fields: list[str] = key(
        ["A", "B", "C", "D"], "Columns of the options, or one column that holds a list.", min_length=1, ours=True
    )
    answer_field: str = key(
        "answer",
        "Column of the right answer: letter, index from 0, or text; absent if answers are withheld.",
        ours=True,
    )
    topic_field: str | None = key(None, "Column of the topic, for a table of results by topic.", ours=True)
    limit: int | None = key(None, "Number of questions to ask, from the first on. Default: all.", gt=0, ours=True)
    compare_with: str | None = key(
        None,
        "items.jsonl of another checkpoint, to compare with by an exact McNemar test and by negative flips (right "
        "there, wrong here).",
        ours=True,
    )


class EvaluationKeys(Keys):
    eval_tasks: list[str] | None = key(None, "Tasks of lm-eval (extra `eval`) that eval.py runs.")
    eval_task_path: str | None = key(
        None, "Folder of task YAMLs; if given, only these tasks are known and nothing is downloaded.", ours=True
    )
    eval_num_fewshot: int | None = key(
        None, "Number of examples before each request. Default: the task's.", ge=0, ours=True
    )
    eval_limit: int | None = key(
        None, "Number of documents of each task, from the first on. Default: all.", gt=0, ours=True
    )
    eval_apply_chat_template: bool = key(False, "Format requests with the chat template.", ours=True)
    eval_system_prompt: str | None = key(None, "System prompt for lm-eval's requests.", ours=True)
    eval_documents: list[str] | None = key(
        None,
        "Documents to measure perplexity on, one by one: .jsonl files with `text` (and `source`), or prefixes of "
        ".bin/.idx pairs.",
        min_length=1,
        ours=True,
    )
    mcq: McqKeys = key(McqKeys(), "Questions of mcq.py and how it asks them.", ours=True)


# --- rules


@registry.rule("eval")
def tasks_have_lm_eval(args: EvaluationKeys) -> str | None:
    if not args.eval_tasks or find_spec("lm_eval") is not None:
        return None
    return "eval_tasks needs lm-eval, which is not installed: pip install .[eval]"


@registry.rule("eval", "mcq")
def texts_have_a_tokenizer(args: AllKeys) -> str | None:
    asks = "mcq.items" if args.mcq.items else "eval_tasks" if args.eval_tasks else "eval_documents"
    if args.vocab_file or not (args.mcq.items or args.eval_tasks or args.eval_documents):
        return None
    return f"{asks} needs vocab_file, the tokenizer's file: questions and documents are text"


@registry.rule("mcq")
def questions_are_given(args: EvaluationKeys) -> str | None:
    return None if args.mcq.items else "mcq.items is missing: the file of questions (--mcq.items FILE)"


@registry.rule("mcq")
def conversations_have_no_shots(args: AllKeys) -> str | None:
    if not args.chat and args.mcq.prefill is not None:
        return "mcq.prefill begins the answer of a conversation; add chat: true, or leave it out"
    if args.chat and args.mcq.shots:
        return "mcq.shots are examples in a plain prompt, not in a conversation; leave out chat, or the shots"
    return None


@registry.rule("mcq")
def thinking_is_generated(args: AllKeys) -> str | None:
    if not args.thinking or args.mcq.method == "generate":
        return None
    return (
        f"thinking: on needs generated text before the answer, which mcq.method: {args.mcq.method} does not "
        f"produce; use generate"
    )


@registry.rule("mcq")
def thinking_prefills_itself(args: AllKeys) -> str | None:
    if not args.thinking or args.mcq.prefill is None:
        return None
    return "thinking: on begins the answer with <think>; leave mcq.prefill out"


@registry.rule("mcq")
def shots_have_a_file(args: EvaluationKeys) -> str | None:
    if bool(args.mcq.shots) == bool(args.mcq.shots_file):
        return None
    given, missing = ("shots", "shots_file") if args.mcq.shots else ("shots_file", "shots")
    return f"mcq.{given} is given without mcq.{missing}: give the number of examples and the file they come from"
