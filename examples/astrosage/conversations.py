"""Three sets of conversations in the formats of AstroSage-70B's fine-tuning data.

    python examples/astrosage/conversations.py --output astrosage_out --seed 0

Writes `sft/{reasoning,astronomy,general}.jsonl`, `sft/valid_astronomy.jsonl` and `chat.jsonl`, from the facts in
`facts.json` that may be asked about:

- `reasoning`: comparisons that take a step or two, with or without a reasoning trace, with the fields of
  Llama-Nemotron-Post-Training (`input`, `output`, `reasoning`);
- `astronomy`: questions about objects (`messages`);
- `general`: questions about elements, in OpenHermes 2.5's format (`conversations`, `from`, `value`).

Some conversations occur twice, as they do when data sets are combined.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.astrosage import wordings  # noqa: E402
from examples.astrosage.facts import Element, SkyObject  # noqa: E402

VALID = 60
TWICE = 30  # one in this many conversations
Record = dict[str, Any]


def messages(question: str, answer: str) -> Record:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def open_hermes(question: str, answer: str) -> Record:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, "source": "elements"}


def nemotron(problem: str, trace: str, answer: str, thinks: bool) -> Record:
    """A record with or without the reasoning trace."""
    return {
        "input": [{"role": "user", "content": problem}],
        "output": f"<think>\n{trace}\n</think>\n\n{answer}" if thinks else answer,
        "reasoning": "on" if thinks else "off",
        "category": "science",
    }


def problem(objects: list[SkyObject], elements: list[Element], chance: random.Random) -> tuple[str, str, str]:
    """(problem, trace, answer)"""
    kind = chance.randrange(4)
    if kind == 0:
        one, two = chance.sample(elements, 2)
        more = one if one.number > two.number else two
        return (
            f"Which has more protons, {one.name} or {two.name}?",
            f"The number of {one.name} is {one.number}. The number of {two.name} is {two.number}. "
            f"The larger number is {more.number}.",
            more.name,
        )
    if kind == 1:
        one = chance.choice(elements)
        return (
            f"What is the atomic number of the element with the symbol {one.symbol}?",
            f"The symbol {one.symbol} is of {one.name}. The number of {one.name} is {one.number}.",
            str(one.number),
        )
    first = chance.choice(objects)
    if kind == 2:
        return (
            chance.choice(wordings.SKY_ASKED).format(o=first.name),
            f"{first.name} is {wordings.with_article(first.kind)}. "
            f"{first.name} lies in the constellation {first.constellation}.",
            first.constellation,
        )
    others = [one for one in objects if one.constellation == first.constellation and one != first]
    second = chance.choice(others if others and chance.random() < 0.5 else objects)
    same = second.constellation == first.constellation
    return (
        f"Are {first.name} and {second.name} in the same constellation?",
        f"{first.name} lies in the constellation {first.constellation}. {second.name} lies in the constellation "
        f"{second.constellation}. These are {'the same' if same else 'not the same'}.",
        "Yes" if same else "No",
    )


def asked(
    facts: list[Any], ask: Callable[[Any, random.Random], tuple[str, str]], count: int, chance: random.Random
) -> list[tuple[str, str]]:
    """`count` questions about the facts in turn; half of them are labeled as questions, as in the test."""
    found = []
    for number in range(count):
        question, answer = ask(facts[number % len(facts)], chance)
        found.append((f"Question: {question}" if chance.random() < 0.5 else question, answer))
    return found


def chats(
    objects: list[SkyObject], held: list[SkyObject], elements: list[Element], chance: random.Random
) -> list[Record]:
    """Prompts for the finished model, with the expected answers."""
    pairs = [(wordings.SKY_ASKED[0].format(o=one.name), one.constellation) for one in (*objects[:2], *held[:2])]
    pairs.append((wordings.SYMBOL_ASKED[1].format(e=elements[0].name), elements[0].symbol))
    said, _, answer = problem(objects, elements, chance)
    pairs.append((said, answer))
    return [{"messages": [{"role": "user", "content": question}], "expected": right} for question, right in pairs]


def write(path: Path, records: list[Record], chance: random.Random) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    records = records + records[::TWICE]
    chance.shuffle(records)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    print(f"{path}: {len(records)} conversations")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder with facts.json, for sft/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=3000, help="conversations per set, before deduplication")
    options = parser.parse_args()
    out, chance = options.output, random.Random(options.seed + 1)
    facts = json.loads((out / "facts.json").read_text())
    objects = [SkyObject(**one) for one in facts["asked"]]
    elements = [Element(**one) for one in facts["general_asked"]]
    problems = [nemotron(*problem(objects, elements, chance), chance.random() < 0.6) for _ in range(options.count)]
    write(out / "sft/reasoning.jsonl", problems, chance)
    sky = [messages(*pair) for pair in asked(objects, wordings.asked_of_sky, options.count, chance)]
    write(out / "sft/astronomy.jsonl", sky, chance)
    general = [open_hermes(*pair) for pair in asked(elements, wordings.asked_of_element, options.count, chance)]
    write(out / "sft/general.jsonl", general, chance)
    unseen = [messages(wordings.SKY_TEST.format(o=one.name), one.constellation) for one in objects[:VALID]]
    (out / "sft/valid_astronomy.jsonl").write_text("".join(json.dumps(one) + "\n" for one in unseen))
    held = [SkyObject(**one) for one in facts["held"]]
    (out / "chat.jsonl").write_text("".join(json.dumps(one) + "\n" for one in chats(objects, held, elements, chance)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
