"""Checkable facts, questions about them, real text and a tokenizer, all without a download.

    python examples/demo_facts.py --output demo_out

Writes `text/{domain,general}_{train,valid}.jsonl`, `questions.jsonl` and `tokenizer/`:

- the domain is observing notes from examples/astrosage (`facts.py` there names sources and licenses). They give the
  constellation of objects under invented names, so that only a model trained on them can know it;
- general text is Python's own documentation topics, and notes, questions and answers on other objects. The base model
  is trained on it: it knows how to answer a question, and nothing about the domain;
- the domain's documents also contain questions about some of their objects. The test is about the others (`told`), and
  about objects that are in no text at all (`in no text`), for which an honest score stays at chance.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from functools import partial
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from examples.astrosage import wordings  # noqa: E402
from examples.astrosage.documents import notes, tokenizer_texts  # noqa: E402
from examples.astrosage.facts import ATTRIBUTION, Facts, SkyObject, distractors, facts_of  # noqa: E402
from examples.demo_data import documents, save_tokenizer, topics, write_jsonl  # noqa: E402

KNOWN, ASKED, TOLD, UNTOLD = 60, 20, 40, 40  # objects: of the base model, of the domain, in no text
TIMES = 150  # mentions of each object in the notes
VALID = {"topics": 5, "notes": 20, "questions": 20, "domain": 40}  # documents
QUESTION = wordings.SKY_ASKED[0]
# Sentences that name the object before its constellation; a few hundred steps are too few to learn more forms.
SENTENCES = tuple(one for one in wordings.SKY if -1 < one.find("{o}") < one.find("{c}"))


def questions_and_answers(objects: list[SkyObject], count: int, chance: random.Random) -> list[str]:
    """Documents of four questions with their answers."""
    found = []
    for _ in range(count):
        pairs = [
            (chance.choice(wordings.SKY_ASKED).format(o=o.name), o.constellation) for o in chance.choices(objects, k=4)
        ]
        found.append("\n\n".join(f"Question: {asked}\nAnswer: {answer}" for asked, answer in pairs) + "\n")
    return found


def texts(facts: Facts, chance: random.Random) -> dict[str, list[str]]:
    """Documents by `SOURCE_train` and `SOURCE_valid`, shuffled."""
    tell = partial(wordings.told_of_sky, sentences=SENTENCES)
    known = notes(facts.famous, TIMES, tell, chance)
    domain = notes(facts.told, TIMES, tell, chance)
    kinds = {
        "topics": documents(topics()),
        "notes": known,
        "questions": questions_and_answers(facts.famous, len(known), chance),
        "domain": domain + questions_and_answers(facts.asked, len(domain) // 4, chance),
    }
    found: dict[str, list[str]] = {}
    for kind, documents_of_it in kinds.items():
        source = "domain" if kind == "domain" else "general"
        chance.shuffle(documents_of_it)
        found.setdefault(f"{source}_valid", []).extend(documents_of_it[: VALID[kind]])
        found.setdefault(f"{source}_train", []).extend(documents_of_it[VALID[kind] :])
    for mixed in found.values():
        chance.shuffle(mixed)
    return found


def questions(facts: Facts, chance: random.Random) -> list[dict[str, str]]:
    """The test questions, in AstroMLab-1's columns; wrong options are drawn by their frequency."""
    pool = [one.constellation for one in facts.told]
    found = []
    for topic, objects in (("told", facts.held), ("in no text", facts.control)):
        for one in objects:
            options = [one.constellation, *distractors(one.constellation, pool, chance)]
            chance.shuffle(options)
            letters = dict(zip("ABCD", options, strict=True))
            answer = "ABCD"[options.index(one.constellation)]
            found.append({"topic": topic, "question": QUESTION.format(o=one.name), **letters, "answer": answer})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for text/, questions.jsonl and tokenizer/")
    parser.add_argument("--model", type=Path, default=ROOT / "configs/tiny/model.yml", help="for the vocabulary size")
    parser.add_argument("--seed", type=int, default=0, help="seed of names, roles and wordings")
    options = parser.parse_args()
    out, chance = options.output, random.Random(options.seed)
    (out / "text").mkdir(parents=True, exist_ok=True)
    facts = facts_of(options.seed, famous=KNOWN, asked=ASKED, held=TOLD, control=UNTOLD)
    written = texts(facts, chance)
    for name, found in written.items():
        write_jsonl(out / f"text/{name}.jsonl", found)
    asked = questions(facts, chance)
    (out / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    print(f"{out / 'questions.jsonl'}: {len(asked)} questions")
    vocab_size = yaml.safe_load(options.model.read_text())["vocab_size"]
    read = tokenizer_texts(facts, written["general_train"], options.seed, chance)
    save_tokenizer(read, vocab_size, out / "tokenizer")
    print(ATTRIBUTION)
    return 0


if __name__ == "__main__":
    sys.exit(main())
