"""The raw material of the example: astronomy as OCR leaves it, general text for replay, and the base's tokenizer.

    python examples/astrosage/raw_text.py --output astrosage_out

writes `raw/astronomy.jsonl.zst` (docstrings of `astropy`, some of them damaged), `raw/general.jsonl.zst` (the
standard library's docstrings and Python's documentation topics), a clean `raw/*_valid.jsonl` of each, and
`tokenizer/`. The text is real; the damage is done here, in the ways that papers suffer it, and each damaged record
says in its field `damage` what was done to it, so that a later step can count what the cleaning found.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import yaml
import zstandard

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.demo_data import MIN_LENGTH, is_valid, named_docstrings, save_tokenizer, topics  # noqa: E402

VALID_SHARE = 0.04
LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3")
DAMAGE = {  # what is done to which share of the astronomy documents
    "mojibake": 0.06,  # UTF-8 read as Windows-1252
    "ligatures": 0.06,  # the glyphs of a PDF font
    "loop": 0.05,  # an OCR model that cannot stop
    "noise": 0.04,  # a page that was not text
    "header": 0.02,  # the running head on every line
    "copy": 0.03,  # the same paper twice
    "version": 0.04,  # the same paper, revised
}


def astropy() -> list[tuple[str, str]]:
    """(name, docstring), each text once, without the pieces that are too short to say anything."""
    spec = importlib.util.find_spec("astropy")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("raw_text.py: the package astropy is not installed (make venv installs it)")
    return _long(named_docstrings(Path(next(iter(spec.submodule_search_locations))), "astropy"))


def standard_library() -> list[tuple[str, str]]:
    return _long(named_docstrings(Path(sysconfig.get_paths()["stdlib"]), "", LEFT_OUT))


def _long(items: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Names by text, each text under its first name."""
    first: dict[str, str] = {}
    for name, text in items:
        if len(text) >= MIN_LENGTH:
            first.setdefault(text.strip() + "\n", name)
    return [(name, text) for text, name in first.items()]


def damaged(name: str, text: str, kind: str, chance: random.Random) -> list[dict[str, str]]:
    """The records that a document with this kind of damage becomes."""
    words = text.split()
    if kind == "mojibake":
        text = text.replace("'", "\N{RIGHT SINGLE QUOTATION MARK}").replace(" - ", " \N{EN DASH} ")
        text = text.replace("``", "\N{LEFT DOUBLE QUOTATION MARK}").encode().decode("cp1252", "replace")
    elif kind == "ligatures":
        for plain, glyph in (("ffi", "\ufb03"), ("fi", "\ufb01"), ("fl", "\ufb02"), ("ff", "\ufb00")):
            text = text.replace(plain, glyph)
    elif kind == "loop":
        at = chance.randrange(len(words))
        unit = words[at : at + chance.randint(3, 12)]
        cut = text.find(unit[0]) if unit else 0
        text = text[:cut] + (" ".join(unit) + " ") * chance.choice([6, 10, 60]) + text[cut:]
    elif kind == "noise":
        letters = list("".join(words))
        chance.shuffle(letters)
        text = " ".join("".join(letters[i : i + chance.randint(2, 9)]) for i in range(0, len(letters), 6)) + "\n"
    elif kind == "header":
        text = "".join(f"Mon. Not. R. Astron. Soc. 000, 1-20 (2013)\n{line}\n" for line in text.splitlines() if line)
    record = {"id": name, "text": text, "damage": kind}
    if kind == "copy":
        return [{**record, "damage": ""}, {**record, "id": f"{name} (copy)"}]
    if kind == "version":
        for at in range(1, len(words), 150):
            text = text.replace(f" {words[at]} ", " revised ", 1)
        return [{**record, "damage": ""}, {"id": f"{name} (v2)", "text": text, "damage": kind}]
    return [record]


def astronomy(texts: list[tuple[str, str]], chance: random.Random) -> list[dict[str, str]]:
    records = []
    for name, text in texts:
        draw, kind = chance.random(), ""
        for candidate, share in DAMAGE.items():
            if draw < share:
                kind = candidate
                break
            draw -= share
        records += damaged(name, text, kind, chance)
    chance.shuffle(records)
    return records


def write(path: Path, records: list[dict[str, str]]) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.write_bytes(zstandard.compress(text) if path.suffix == ".zst" else text)
    print(f"{path}: {len(records)} documents, {sum(len(r['text']) for r in records) / 1e6:.2f} million characters")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for raw/ and tokenizer/")
    parser.add_argument("--model", type=Path, default=ROOT / "configs/tiny/model.yml", help="says the vocabulary size")
    parser.add_argument("--share", type=float, default=0.6, help="of the astronomy texts, to keep the example short")
    options = parser.parse_args()
    (options.output / "raw").mkdir(parents=True, exist_ok=True)
    general = [*standard_library(), *(("topic", text) for text in topics())]
    parts = {"astronomy": astropy(), "general": general}
    plain: dict[str, list[dict[str, str]]] = {}
    for name, texts in parts.items():
        valid = [{"id": n, "text": t} for n, t in texts if is_valid(t, VALID_SHARE)]
        write(options.output / f"raw/{name}_valid.jsonl", valid)
        plain[name] = [{"id": n, "text": t} for n, t in texts if not is_valid(t, VALID_SHARE)]
    chance = random.Random(0)
    kept = [record for record in plain["astronomy"] if chance.random() < options.share]
    records = astronomy([(record["id"], record["text"]) for record in kept], chance)
    write(options.output / "raw/astronomy.jsonl.zst", records)
    counts = Counter(record["damage"] for record in records if record["damage"])
    print("  of them damaged: " + ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items())))
    write(options.output / "raw/general.jsonl.zst", plain["general"])
    vocab_size = yaml.safe_load(options.model.read_text())["vocab_size"]
    texts = [record["text"] for record in (*plain["general"], *plain["astronomy"])]
    save_tokenizer(texts, vocab_size, options.output / "tokenizer")
    return 0


if __name__ == "__main__":
    sys.exit(main())
