"""lm-eval's view of the model: text in, log-probabilities and text out. The only file that imports lm-eval.

lm-eval runs only on rank 0, as one process; `DrivenModel` involves the other ranks. Every input has exactly one
begin-of-text token, at the start: two or none are known to cost several points silently.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from megatron.common.errors import UserError
from megatron.evaluation.answers import TextLimits
from megatron.evaluation.driver import DrivenModel
from megatron.evaluation.prompts import PromptEncoder
from megatron.evaluation.rolling import rolling_pairs
from megatron.evaluation.scoring import Pair
from megatron.tokenizer.conversation import Message

logger = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 256  # lm-eval's default for tasks that set no limit
BOOTSTRAP_DRAWS = 1000  # for metrics whose standard error has no closed form


class EngineLM(TemplateLM):
    """`lm_eval.api.model.LM` on the ranks of a run. `log` collects the scored ids with their log-probabilities."""

    def __init__(self, model: DrivenModel, encoder: PromptEncoder) -> None:
        super().__init__()
        self._model, self._encoder = model, encoder
        self.max_length = model.args.seq_length
        self.log: list[dict[str, Any]] = []
        self.cut = 0  # inputs that lost their beginning because they did not fit
        self.joined_differently = 0  # continuations that merged with their context in the tokenizer

    @property
    def eot_token_id(self) -> int:
        return self._encoder.tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        bos = self._encoder.tokenizer.bos
        return self._encoder.tokenizer.eod if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self._encoder.tokenizer.fingerprint.replace(":", "-")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids with one begin-of-text token in front, or none for `add_special_tokens=False`."""
        bos = self._encoder.tokenizer.bos
        # Names of special tokens stand for tokens only in the output of the chat template, elsewhere for themselves.
        encode = self._encoder.tokenizer.encode if self._encoder.chat is None else self._encoder.with_special_tokens
        ids = list(encode(string))
        if add_special_tokens is False or bos is None:
            return ids
        ids = ids if ids[:1] == [bos] else [bos, *ids]
        if ids.count(bos) != 1:
            raise UserError(f"a request has {ids.count(bos)} begin-of-text tokens, expected one: {string[:80]!r}")
        return ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        whole = self.tok_encode(context + continuation)
        self.joined_differently += whole[: len(context_ids)] != context_ids
        return context_ids, continuation_ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitting(context, continuation) for _, context, continuation in requests]
        scores = self._model.score(pairs)
        for pair, score in zip(pairs, scores, strict=True):
            self.log.append({"context": pair.context, "continuation": pair.continuation, "log_probs": score.log_probs})
        return [(score.total, score.is_greedy) for score in scores]

    def _fitting(self, context: list[int], continuation: list[int]) -> Pair:
        """The pair, with the beginning of its context cut off if it is too long."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise UserError(f"a continuation of {len(continuation)} tokens; seq_length {self.max_length} is too short")
        self.cut += len(context) > room
        return Pair(tuple(context[-room:]), tuple(continuation))

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        totals = []
        groups = [
            rolling_pairs(
                tuple(self.tok_encode(request.args[0], add_special_tokens=False)), self.prefix_token_id, self.max_length
            )
            for request in requests
        ]
        found = iter(self._loglikelihood_tokens([("", p.context, p.continuation) for group in groups for p in group]))  # type: ignore[misc]
        for group in groups:
            totals.append(sum(next(found)[0] for _ in group))
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generated texts, each cut before its first stop text, as by lm-eval's own backends."""
        groups: dict[TextLimits, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(self._limits(request.args[1]), []).append(number)
        texts: dict[int, str] = {}
        for limits, numbers in groups.items():
            prompts = [self._prompt(requests[number].args[0], limits.max_tokens) for number in numbers]
            for number, text in zip(numbers, self._model.generate(prompts, limits), strict=True):
                said = self._encoder.text_of(text.ids)
                for stop in limits.stop_texts:
                    said = said.partition(stop)[0]
                texts[number] = said
        return [texts[number] for number in range(len(requests))]

    def _limits(self, given: dict[str, Any]) -> TextLimits:
        until = given.get("until") or ()
        stops = (until,) if isinstance(until, str) else tuple(stop for stop in until if stop)
        most = int(given.get("max_gen_toks", given.get("max_new_tokens", DEFAULT_NEW_TOKENS)))
        temperature = float(given.get("temperature") or 0.0) if given.get("do_sample") else 0.0
        known = {"until", "max_gen_toks", "max_new_tokens", "temperature", "do_sample"}
        if temperature == 0:
            known |= {"top_p", "top_k"}  # they have no effect on greedy decoding
        unknown = sorted(set(given) - known)
        if unknown:
            raise UserError(f"generation_kwargs {', '.join(unknown)} of a task are not supported; remove them")
        if most >= self.max_length:
            raise UserError(f"max_gen_toks {most} leaves no room for a prompt in seq_length {self.max_length}")
        return TextLimits(most, self._encoder.ends, stops, temperature)

    def _prompt(self, text: str, new_tokens: int) -> tuple[int, ...]:
        ids = self.tok_encode(text)
        room = self.max_length - new_tokens
        self.cut += len(ids) > room
        return tuple(ids[-room:])

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return None if self._encoder.chat is None else self._encoder.chat.name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]  # type: ignore[arg-type]
        begun = ""
        if not add_generation_prompt:
            begun = messages.pop().content  # the assistant's turn, which the model continues
        return self._encoder.conversation_text(messages) + begun


def run_tasks(model: DrivenModel) -> tuple[dict[str, Any], EngineLM]:
    """Run lm-eval as the keys `eval_*` say; returns its results and the model. Raises UserError for an unknown task."""
    args = model.args
    lm = EngineLM(model, PromptEncoder.of(args, chat=args.eval_apply_chat_template))
    manager = TaskManager(include_path=args.eval_task_path, include_defaults=args.eval_task_path is None)
    assert args.eval_tasks is not None
    unknown = sorted(set(args.eval_tasks) - set(manager.all_tasks))
    if unknown:
        where = f"the tasks of {args.eval_task_path}" if args.eval_task_path else "lm-eval's tasks"
        raise UserError(f"eval_tasks: {', '.join(unknown)} not among {where}: {', '.join(manager.all_tasks[:12])}")
    os.environ["DISABLE_MULTIPROC"] = "1"  # a process group does not survive a fork
    results = simple_evaluate(
        model=lm,
        tasks=args.eval_tasks,
        task_manager=manager,
        num_fewshot=args.eval_num_fewshot,
        limit=args.eval_limit,
        apply_chat_template=args.eval_apply_chat_template,
        fewshot_as_multiturn=args.eval_apply_chat_template,
        system_instruction=args.eval_system_prompt,
        bootstrap_iters=BOOTSTRAP_DRAWS,
        log_samples=True,
    )
    assert results is not None  # this is rank 0
    if lm.cut:
        logger.warning(f"{lm.cut} requests were longer than seq_length {args.seq_length} and lost their beginning")
    if lm.joined_differently:
        logger.warning(
            f"{lm.joined_differently} continuations are tokenized together with the end of their context: the scored "
            f"tokens are not those of the continuation alone. Begin choices with a space, end contexts without one"
        )
    return results, lm
