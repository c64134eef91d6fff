"""Keys of generation and chat that GPT-NeoX does not have, and the rules of generation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron.neox_arguments.keys.fields import Keys, key
from megatron.neox_arguments.registry import Derived, Registry

if TYPE_CHECKING:
    from megatron.neox_arguments.keys.all_keys import AllKeys

registry = Registry()


class GenerationKeys(Keys):
    min_p: float = key(
        0.0, "Exclude tokens below this fraction of the highest token probability; 0 is off.", ours=True, ge=0, le=1
    )
    repetition_penalty: float = key(
        1.0,
        "Positive logits of tokens that occur in the prompt or the text so far are divided by this, negative ones "
        "multiplied; 1 is off.",
        ours=True,
        gt=0,
    )
    stop: list[str] = key([], "Strings that end a text, and are not part of it.", ours=True)
    stop_token_ids: list[int] = key(
        [],
        "Token ids that end a text, in addition to end of document and end of turn (`<|eot_id|>`, `<|eom_id|>`).",
        ours=True,
    )
    generation_batch_size: int = key(
        8, "Sequences that a replica generates at once, per pipeline stage.", ours=True, gt=0
    )
    prefill_chunk: int = key(512, "Prompt tokens of a sequence that one forward pass processes.", ours=True, gt=0)
    chat: bool = key(
        False,
        "Take prompts as user turns, or whole conversations (docs/generation.md); mcq.py asks in conversations.",
        ours=True,
    )
    chat_template: str | None = key(
        None,
        "Chat format: a model folder, a tokenizer_config.json, a Jinja file, or a built-in name such as llama3.1. "
        "Default: Meta's Llama-3 format.",
        ours=True,
    )
    system_prompt: str | None = key(None, "System prompt for every conversation that has none.", ours=True)
    thinking: bool | None = key(
        None,
        "Reasoning before the answer. on: ask for it by the system line `detailed thinking on` and an answer that "
        "begins with `<think>`; off: system line `detailed thinking off`; absent: neither line.",
        ours=True,
    )
    max_thinking_tokens: int | None = key(
        None, "Tokens after which the reasoning trace is closed. Default: none; 2048 in mcq.py.", ours=True, gt=0
    )
    show_thinking: bool = key(
        True, "Include the reasoning trace in what is shown or written to the output file.", ours=True
    )


# --- derivations


@registry.derivation("generate", fills=("text_gen_type",))
def chats_are_typed(args: AllKeys, world_size: int | None) -> Derived:
    typed = args.chat and args.text_gen_type is None and not args.sample_input_file
    return Derived({"text_gen_type": "interactive"} if typed else {})


# --- rules


@registry.rule("generate")
def text_needs_a_vocabulary(args: AllKeys) -> str | None:
    if args.vocab_file or args.modality == "patches":
        return None
    return "generate.py reads and writes text: give vocab_file, the tokenizer's file"


@registry.rule("generate")
def stop_strings_are_not_empty(args: GenerationKeys) -> str | None:
    return "stop has an empty string, which would end every text at once; remove it" if "" in args.stop else None


@registry.rule("generate")
def stop_ids_are_in_the_vocabulary(args: AllKeys) -> str | None:
    if args.vocab_size is None:  # the tokenizer is not on this machine
        return None
    wrong = [index for index in args.stop_token_ids if not 0 <= index < args.vocab_size]
    return f"stop_token_ids {wrong} are not ids of the vocabulary, 0 to {args.vocab_size - 1}" if wrong else None


@registry.rule("generate", "mcq")
def chat_keys_need_chat(args: GenerationKeys) -> str | None:
    names = ("chat_template", "system_prompt", "thinking", "max_thinking_tokens")
    given = [name for name in names if getattr(args, name) is not None]
    if args.chat or not given:
        return None
    return f"{', '.join(given)} without chat: these keys apply only to conversations; add chat: true"


@registry.rule("generate", "mcq")
def a_budget_is_of_a_trace(args: GenerationKeys) -> str | None:
    limit = args.max_thinking_tokens
    if limit is None or args.thinking:
        return None
    return f"max_thinking_tokens {limit} without thinking: on: there is no reasoning to limit; leave it out"


@registry.rule("generate")
def thinking_has_a_budget_within_the_text(args: AllKeys) -> str | None:
    if args.max_thinking_tokens is None or not args.thinking or args.max_thinking_tokens < args.maximum_tokens:
        return None
    return (
        f"max_thinking_tokens {args.max_thinking_tokens} is not below maximum_tokens {args.maximum_tokens}, which "
        f"counts reasoning and answer: no token would be left for the answer"
    )


@registry.rule("generate")
def chats_have_prompts(args: AllKeys) -> str | None:
    if not args.chat or args.text_gen_type != "unconditional":
        return None
    return "chat with text_gen_type unconditional: there is nothing to answer; give sample_input_file or interactive"


@registry.warning("generate")
def greedy_ignores_limits(args: AllKeys) -> str | None:
    names = [name for name in ("top_k", "top_p", "min_p") if getattr(args, name)]
    if args.temperature or not names:
        return None
    return (
        f"{', '.join(names)} without effect: temperature is 0, which takes the most likely token (GPT-NeoX would "
        f"sample at temperature 1); give a temperature"
    )


@registry.warning("generate")
def greedy_samples_are_equal(args: AllKeys) -> str | None:
    if args.temperature or args.num_samples == 1 or args.text_gen_type == "interactive":
        return None
    return f"all {args.num_samples} samples of a prompt will be equal: temperature is 0"
