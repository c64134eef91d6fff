"""Multiple choice from held-out texts: which of four passages goes on as the text does?

    python examples/astrollama/questions.py --text domain_valid.jsonl --output questions.jsonl

The question is a text's beginning, the right option its next words, the wrong ones the same stretch of other texts.
They are made questions: as far from an exam in astronomy as the texts are from papers.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

BEGINNING, NEXT = 24, 12  # words
OPTIONS = "ABCD"


def make_questions(texts: list[str], seed: int) -> list[dict[str, str]]:
    """One question for each text that is long enough, its options in a random order."""
    chance = random.Random(seed)
    words = [words for words in (text.split() for text in texts) if len(words) >= BEGINNING + NEXT]
    passages = [" ".join(one[BEGINNING : BEGINNING + NEXT]) for one in words]
    questions = []
    for number, one in enumerate(words):
        others = [other for other in range(len(words)) if passages[other] != passages[number]]
        order = [number, *chance.sample(others, 3)]
        chance.shuffle(order)
        options = dict(zip(OPTIONS, (passages[other] for other in order), strict=True))
        answer = OPTIONS[order.index(number)]
        questions.append({"question": " ".join(one[:BEGINNING]), **options, "answer": answer})
    return questions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--most", type=int, default=150)
    options = parser.parse_args()
    texts = [json.loads(line)["text"] for line in options.text.read_text().splitlines()]
    questions = make_questions(texts, seed=0)[: options.most]
    options.output.write_text("".join(json.dumps(question) + "\n" for question in questions))
    print(f"{options.output}: {len(questions)} questions, a guess is right in {1 / len(OPTIONS):.0%}")


if __name__ == "__main__":
    main()
