"""Three sets of conversations in the shapes that the data sets of AstroSage-70B's fine-tune have.

    python examples/astrosage/conversations.py --output astrosage_out

writes `sft/{reasoning,astronomy,general}.jsonl` and `sft/valid_astronomy.jsonl`:

- `reasoning`: arithmetic of astronomy, thought through or not, with the fields of Llama-Nemotron-Post-Training
  (`input`, `output`, `reasoning`);
- `astronomy`: questions about astropy, answered with the first paragraph of the docstring (`messages`);
- `general`: the same about the standard library, in OpenHermes 2.5's shape (`conversations`, `from`, `value`).

Some conversations come twice, as they do when sets are put together.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.astrosage.raw_text import VALID_SHARE, astropy, standard_library  # noqa: E402
from examples.demo_data import is_valid  # noqa: E402

QUESTIONS = ("What is {} for?", "What does {} do?", "Explain {} in a few words.", "When would I use {}?")
Record = dict[str, Any]


def summary(text: str) -> str | None:
    """The first paragraph of a docstring as one line, if it is an answer and not a heading or a wall of text."""
    answer = " ".join(re.split(r"\n\s*\n", text.strip())[0].split())
    return answer if 30 <= len(answer) <= 300 and answer.endswith(".") else None


def answered(texts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(name, summary) of what has one, by its short name."""
    pairs = ((name.split(".")[-1], summary(text)) for name, text in texts)
    return [(name, answer) for name, answer in pairs if answer and not name.startswith("_")]


def messages(question: str, answer: str) -> Record:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def open_hermes(question: str, answer: str) -> Record:
    return {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        "source": "standard library",
    }


def nemotron(chance: random.Random) -> Record:
    """A problem with a trace of thought, or the same without."""
    distance = chance.randint(11, 999)
    problem, trace, answer = chance.choice(
        [
            (
                f"A galaxy recedes at {70 * distance} km/s. How far away is it, with a Hubble constant of 70 km/s/Mpc?",
                f"v = H0 d, so d = v / H0 = {70 * distance} / 70 = {distance}.",
                f"It is {distance} Mpc away.",
            ),
            (
                f"A star has a parallax of {distance} milliarcseconds. What is its distance in parsecs?",
                f"d = 1 / p with p in arcseconds, so d = 1000 / {distance} = {1000 / distance:.2f}.",
                f"Its distance is {1000 / distance:.2f} pc.",
            ),
            (
                f"How many magnitudes fainter does a star look from {distance} times as far away?",
                f"The flux falls as the square: 2.5 log10({distance}^2) = 5 log10({distance}) "
                f"= {5 * math.log10(distance):.2f}.",
                f"It looks {5 * math.log10(distance):.2f} magnitudes fainter.",
            ),
        ]
    )
    thinks = chance.random() < 0.6
    output = f"<think>\n{trace}\n</think>\n\n{answer}" if thinks else answer
    return {
        "input": [{"role": "user", "content": problem}],
        "output": output,
        "reasoning": "on" if thinks else "off",
        "category": "science",
    }


def ask(
    pairs: list[tuple[str, str]], shape: Callable[[str, str], Record], count: int, chance: random.Random
) -> list[Record]:
    """`count` questions about the pairs, one in thirty of them there already."""
    chance.shuffle(pairs)
    records = [shape(chance.choice(QUESTIONS).format(name), answer) for name, answer in pairs[:count]]
    return records + records[:: max(1, len(records) // max(1, len(records) // 30))]


def write(path: Path, records: list[Record]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    print(f"{path}: {len(records)} conversations")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for sft/")
    parser.add_argument("--count", type=int, default=1500, help="conversations of each set, at most")
    options = parser.parse_args()
    folder = options.output / "sft"
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(1)
    texts = astropy()
    train = answered([(name, text) for name, text in texts if not is_valid(text, VALID_SHARE)])
    valid = answered([(name, text) for name, text in texts if is_valid(text, VALID_SHARE)])
    write(folder / "reasoning.jsonl", [nemotron(chance) for _ in range(options.count)])
    write(folder / "astronomy.jsonl", ask(train, messages, options.count, chance))
    write(folder / "general.jsonl", ask(answered(standard_library()), open_hermes, options.count, chance))
    write(folder / "valid_astronomy.jsonl", [messages(QUESTIONS[0].format(n), a) for n, a in valid])
    return 0


if __name__ == "__main__":
    sys.exit(main())
