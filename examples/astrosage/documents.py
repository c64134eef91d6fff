"""Documents, questions and a tokenizer for the small AstroSage, all made from `facts.py`.

    python examples/astrosage/documents.py --output astrosage_out --seed 0

Writes

- `raw/astronomy.jsonl.zst`: observing notes, each of a few sentences on several objects, some of them damaged
- `raw/general.jsonl.zst`: for replay: notes on the elements and on famous objects, and questions with answers as in web
  text
- `raw/{astronomy,general}_valid.jsonl`: validation documents of both kinds
- `base/text.jsonl`: training text of the stand-in for the base model, of the kind of `general`
- `questions.jsonl`: the test. `topic` says which facts: held, in a wording that the fine-tune uses for other objects
  (`held`) or in one that no training text has (`held_new_wording`), `control`, `general`
- `completions.jsonl`: beginnings of sentences from the documents, with the right constellation
- `facts.json`, with the role of every fact; and `tokenizer/`
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import yaml
import zstandard

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.astrosage import wordings  # noqa: E402
from examples.astrosage.damage import Record, damage  # noqa: E402
from examples.astrosage.facts import Facts, SkyObject, designation, distractors, facts_of  # noqa: E402
from examples.demo_data import save_tokenizer  # noqa: E402

T = TypeVar("T")
SENTENCES = 9  # in a document
VALID = 40  # documents


def notes(facts: list[T], times: int, tell: Callable[[T, random.Random], str], chance: random.Random) -> list[str]:
    """Documents of SENTENCES sentences; each fact comes up `times` times, mostly in different company."""
    order = [fact for _ in range(times) for fact in chance.sample(facts, len(facts))]
    sentences = [tell(fact, chance) for fact in order]
    return [
        chance.choice((" ", "\n")).join(sentences[at : at + SENTENCES]) + "\n"
        for at in range(0, len(sentences), SENTENCES)
    ]


def web_questions(facts: Facts, count: int, chance: random.Random) -> list[str]:
    """Documents of a few questions and answers, labeled or not, on facts that the base model may be asked about."""
    found = []
    for _ in range(count):
        if chance.random() < 0.5:
            pairs = [wordings.asked_of_element(chance.choice(facts.general_asked), chance) for _ in range(4)]
        else:
            pairs = [wordings.asked_of_sky(chance.choice(facts.famous), chance) for _ in range(4)]
        form = chance.choice(("Question: {}\nAnswer: {}", "{}\n{}"))
        found.append("\n\n".join(form.format(*pair) for pair in pairs) + "\n")
    return found


def general(facts: Facts, times: int, chance: random.Random) -> list[str]:
    """Documents like the base model's training text: the elements, a few famous objects, and questions with answers."""
    told = notes(facts.elements, times, wordings.told_of_element, chance)
    told += notes(facts.famous, times // 2, wordings.told_of_sky, chance)
    texts = told + web_questions(facts, len(told), chance)
    chance.shuffle(texts)
    return texts


def questions(facts: Facts, chance: random.Random) -> Iterator[dict[str, str]]:
    """The test questions, in AstroMLab-1's columns."""
    pool = [one.constellation for one in facts.told]
    for topic, objects, wording in (
        ("held", facts.held, wordings.SKY_ASKED[0]),
        ("held_new_wording", facts.held, wordings.SKY_TEST),
        ("control", facts.control, wordings.SKY_ASKED[0]),
        ("control_new_wording", facts.control, wordings.SKY_TEST),
    ):
        for one in objects:
            yield _item(topic, wording.format(o=one.name), one.constellation, pool, chance)
    symbols, numbers = [one.symbol for one in facts.elements], [str(one.number) for one in facts.elements]
    for element in facts.general_held:
        yield _item("general", wordings.SYMBOL_ASKED[1].format(e=element.name), element.symbol, symbols, chance)
        yield _item("general", wordings.NUMBER_ASKED[0].format(e=element.name), str(element.number), numbers, chance)


def _item(topic: str, question: str, answer: str, pool: list[str], chance: random.Random) -> dict[str, str]:
    options = [answer, *distractors(answer, pool, chance)]
    chance.shuffle(options)
    letters = dict(zip("ABCD", options, strict=True))
    return {"topic": topic, "question": question, **letters, "answer": "ABCD"[options.index(answer)]}


def tokenizer_texts(facts: Facts, base: list[str], seed: int, chance: random.Random) -> list[str]:
    """The tokenizer's training text: the base model's text, and sentences on objects that do not exist.

    It contains syllables and constellations but no real designation, so that told objects and controls tokenize alike.
    """
    taken = frozenset(one.name for one in [*facts.told, *facts.control])
    invented = [
        SkyObject("", designation(seed, f"invented {n}", taken), real.kind, real.constellation)
        for n, real in enumerate(facts.told * 3)
    ]
    asked = [chance.choice(wordings.SKY_ASKED).format(o=one.name) for one in invented]
    return base + notes(invented, 3, wordings.told_of_sky, chance) + asked


def write(path: Path, records: list[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.write_bytes(zstandard.compress(text) if path.suffix == ".zst" else text)
    print(f"{path}: {len(records)} records, {len(text) / 1e6:.2f} MB")


def documents(name: str, texts: list[str]) -> list[Record]:
    return [{"id": f"{name} {number}", "text": text} for number, text in enumerate(texts)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="seed of roles, designations and wordings")
    parser.add_argument("--model", type=Path, default=ROOT / "examples/astrosage/model.yml", help="its vocab_size")
    parser.add_argument("--objects", type=int, nargs=3, default=[200, 200, 100], metavar=("ASKED", "HELD", "CONTROL"))
    parser.add_argument("--elements", type=int, default=118, help="the first ones")
    parser.add_argument("--famous", type=int, default=60, help="objects that the base model knows")
    parser.add_argument("--times", type=int, default=48, help="how often the documents mention an object")
    parser.add_argument("--base-times", type=int, default=80, help="how often base and replay text mention an element")
    options = parser.parse_args()
    out, chance = options.output, random.Random(options.seed)
    asked, held, control = options.objects
    facts = facts_of(
        options.seed, famous=options.famous, asked=asked, held=held, control=control, elements=options.elements
    )
    base = general(facts, options.base_times, chance)
    replay = general(facts, options.base_times, chance)
    sky = notes(facts.told, options.times, wordings.told_of_sky, chance)
    raw = damage(documents("notes", sky), chance)
    write(out / "raw/astronomy.jsonl.zst", raw)
    counts = Counter(record["damage"] for record in raw if record["damage"])
    print("  of them damaged: " + ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items())))
    write(out / "raw/general.jsonl.zst", documents("general", replay))
    valid = {"astronomy": notes(facts.told, 2, wordings.told_of_sky, chance), "general": general(facts, 4, chance)}
    for name, texts in valid.items():
        write(out / f"raw/{name}_valid.jsonl", documents(f"{name} valid", texts[:VALID]))
    write(out / "base/text.jsonl", documents("base", base))
    write(out / "questions.jsonl", list(questions(facts, chance)))
    completions = [
        {"prompt": wordings.COMPLETION.format(o=one.name), "constellation": one.constellation} for one in facts.held
    ]
    write(out / "completions.jsonl", completions)
    (out / "facts.json").write_text(json.dumps(asdict(facts), indent=1) + "\n")
    vocab_size = yaml.safe_load(options.model.read_text())["vocab_size"]
    save_tokenizer(tokenizer_texts(facts, base, options.seed, chance), vocab_size, out / "tokenizer")
    return 0


if __name__ == "__main__":
    sys.exit(main())
