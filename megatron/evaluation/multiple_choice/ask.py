"""Asks a model every question, by one of three methods: letter probabilities, text probabilities, generated text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron.common.errors import UserError
from megatron.evaluation.answers import AnswerText, TextLimits
from megatron.evaluation.driver import DrivenModel
from megatron.evaluation.multiple_choice.items import Item
from megatron.evaluation.multiple_choice.parse_answer import parse_answer, without_thinking
from megatron.evaluation.multiple_choice.prompts import PromptWriter, Question, orders_of
from megatron.evaluation.multiple_choice.records import Asked, ItemResult
from megatron.evaluation.multiple_choice.statistics import softmax
from megatron.evaluation.scoring import Pair
from megatron.neox_arguments import NeoXArgs
from megatron.tokenizer.conversation import THINK_CLOSING, THINK_END

MAX_THINKING_TOKENS = 2048  # if the configuration sets no limit


def ask_all(model: DrivenModel, writer: PromptWriter, items: Sequence[Item]) -> list[ItemResult]:
    """Ask every item; results in that order. UserError if a prompt exceeds `seq_length`: nothing is truncated."""
    keys = writer.keys
    questions = [question for item in items for question in orders_of(item, keys.cyclic_orders)]
    if keys.method == "generate":
        asked = ask_by_text(model, writer, questions)
    else:
        asked = ask_by_scores(model, writer, questions)
    by_item: dict[int, list[Asked]] = {item.number: [] for item in items}
    for question, one in zip(questions, asked, strict=True):
        by_item[question.item.number].append(one)
    return [_result(item, by_item[item.number]) for item in items]


def _result(item: Item, asked: Sequence[Asked]) -> ItemResult:
    """Combine several orders into one answer: the highest mean probability, or the option chosen by most texts."""
    if len(asked) == 1:
        return ItemResult(item, tuple(asked), asked[0].choice)
    if asked[0].scores:
        shares = [softmax(one.scores) for one in asked]
        means = [sum(column) for column in zip(*shares, strict=True)]
        return ItemResult(item, tuple(asked), max(range(len(means)), key=means.__getitem__))
    votes = Counter(one.choice for one in asked if one.choice is not None).most_common(1)
    return ItemResult(item, tuple(asked), votes[0][0] if votes else None)


def ask_by_scores(model: DrivenModel, writer: PromptWriter, questions: Sequence[Question]) -> list[Asked]:
    """Choose by the probability of each letter, or of each option's text."""
    by_letter = writer.keys.method == "letter"
    pairs = [writer.letters(question) if by_letter else writer.texts(question) for question in questions]
    alone = [] if by_letter else [writer.texts_alone(question) for question in questions]
    for question, group in zip(questions, pairs, strict=True):
        _check_room(question, group, model.args)
    flat = [pair for group in pairs + alone for pair in group]
    found = iter(model.score(flat))
    scores = [[next(found) for _ in group] for group in pairs]
    totals_alone = [[next(found).total for _ in group] for group in alone]
    asked = []
    for number, question in enumerate(questions):
        one = Asked(
            order=question.order,
            choice=None,
            prompt_ids=pairs[number][0].context,
            continuations=tuple(pair.continuation for pair in pairs[number]),
            log_probs=tuple(score.log_probs for score in scores[number]),
            alone=() if by_letter else tuple(totals_alone[number]),
        )
        decisive = calibrated(one) if not by_letter and writer.keys.text_score == "calibrated" else one.sums
        in_order = [0.0] * len(decisive)
        for place, option in enumerate(question.order):
            in_order[option] = decisive[place]
        best = max(range(len(in_order)), key=in_order.__getitem__)
        asked.append(replace(one, choice=best, scores=tuple(in_order)))
    return asked


def calibrated(asked: Asked) -> tuple[float, ...]:
    """By letter: log-probability of each option's text, minus the same after an empty question."""
    return tuple(told - alone for told, alone in zip(asked.sums, asked.alone, strict=True))


def _check_room(question: Question, pairs: Sequence[Pair], args: NeoXArgs) -> None:
    longest = max(len(pair.context) + len(pair.continuation) for pair in pairs)
    if longest > args.seq_length + 1:
        raise UserError(
            f"question {question.item.number} has {longest} tokens with its answer, seq_length {args.seq_length} "
            f"allows {args.seq_length + 1}; give fewer shots, or raise seq_length (up to max_position_embeddings "
            f"{args.max_position_embeddings}). Nothing was cut, nothing was asked"
        )


@dataclass
class _Text:
    """A text that is being generated."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...] = ()
    ended: bool = False
    thinking: str = ""


def ask_by_text(model: DrivenModel, writer: PromptWriter, questions: Sequence[Question]) -> list[Asked]:
    """Choose by a generated answer. If a model thinks beyond its budget, `</think>` is appended and it then answers."""
    keys, encoder = writer.keys, writer.encoder
    texts = [_Text(writer.prompt(question)) for question in questions]
    longest_trace = model.args.max_thinking_tokens or MAX_THINKING_TOKENS
    budget = keys.max_answer_tokens + (longest_trace if writer.thinking else 0)
    for question, text in zip(questions, texts, strict=True):
        if len(text.prompt) + budget > model.args.seq_length:
            raise UserError(
                f"question {question.item.number} has {len(text.prompt)} tokens and its answer may take {budget}, "
                f"seq_length {model.args.seq_length} does not hold both; lower max_thinking_tokens or "
                f"mcq.max_answer_tokens, or raise seq_length"
            )
    if writer.thinking:
        _think(model, writer, texts, longest_trace)
    stops = ("\n",) if writer.plain else ()
    open_ = [text for text in texts if not text.ended]
    limits = TextLimits(keys.max_answer_tokens, encoder.ends, stops, model.args.temperature)
    for text, more in zip(open_, model.generate([t.prompt + t.ids for t in open_], limits), strict=True):
        text.ids, text.ended = text.ids + more.ids, more.ended
    return [_parsed(writer, question, text) for question, text in zip(questions, texts, strict=True)]


def _think(model: DrivenModel, writer: PromptWriter, texts: Sequence[_Text], longest_trace: int) -> None:
    tokenizer = writer.encoder.tokenizer
    limits = TextLimits(longest_trace, writer.encoder.ends, (THINK_END,), model.args.temperature)
    thoughts: list[AnswerText] = model.generate([text.prompt for text in texts], limits)
    for text, thought in zip(texts, thoughts, strict=True):
        text.ids = thought.ids
        if THINK_END in tokenizer.decode(thought.ids):
            text.thinking = "closed"
        else:
            text.thinking = "cut"
            text.ids += tuple(tokenizer.encode(THINK_CLOSING))


def _parsed(writer: PromptWriter, question: Question, text: _Text) -> Asked:
    said = writer.encoder.tokenizer.decode(text.ids)
    given = writer.keys.prefill or ""
    stripped = without_thinking(said) if text.thinking else given + said
    if writer.plain:
        stripped = f"Answer:{stripped}"  # parsed together with the prompt's last word
    found = parse_answer(stripped, question.item.letters, question.options)
    return Asked(
        order=question.order,
        choice=None if found.choice is None else question.order[found.choice],
        prompt_ids=text.prompt,
        generated_ids=text.ids,
        generated=said,
        parsed_by=found.how,
        thinking=text.thinking,
        ended=text.ended,
    )
