"""Damages documents on purpose, as papers are damaged on their way into a corpus, to measure the cleaning.

The damage imitates OCR, PDF fonts and careless collection. The field `damage` of a record says what was done; the
cleaning does not read it.
"""

from __future__ import annotations

import random

Record = dict[str, str]
SHARES = {  # of the documents
    "mojibake": 0.04,  # UTF-8 read as Windows-1252
    "ligatures": 0.04,  # the glyphs of a PDF font
    "loop": 0.06,  # an OCR model that repeats itself
    "header": 0.02,  # the running head on every line
    "copy": 0.03,  # the same paper twice
    "version": 0.03,  # the same paper, revised
}


def damage(records: list[Record], chance: random.Random) -> list[Record]:
    """The records (`id`, `text`) in random order, some of them damaged; `damage` names the kind."""
    found = []
    for record in records:
        kind = chance.choices(["", *SHARES], [1 - sum(SHARES.values()), *SHARES.values()])[0]
        found += damaged(record["id"], record["text"], kind, chance)
    chance.shuffle(found)
    return found


def damaged(name: str, text: str, kind: str, chance: random.Random) -> list[Record]:
    """The records that a document with this kind of damage becomes."""
    words = text.split()
    if kind == "mojibake":
        text = text.replace(". ", "\N{RIGHT SINGLE QUOTATION MARK}. ").encode().decode("cp1252", "replace")
    elif kind == "ligatures":
        for plain, glyph in (("ffi", "\ufb03"), ("fi", "\ufb01"), ("fl", "\ufb02"), ("ff", "\ufb00")):
            text = text.replace(plain, glyph)
    elif kind == "loop":
        at = chance.randrange(len(words) - 12)
        unit = " ".join(words[at : at + chance.randint(3, 5)]) + " "
        cut = text.find(unit)
        text = text[:cut] + unit * chance.choice([6, 6, 60]) + text[cut:]
    elif kind == "header":
        text = "".join(
            f"Mon. Not. R. Astron. Soc. 000, 1-20 (2013)\n{line}.\n" for line in text.split(".") if line.strip()
        )
    record = {"id": name, "text": text, "damage": kind}
    if kind == "copy":
        return [{**record, "damage": ""}, {**record, "id": f"{name} (copy)"}]
    if kind == "version":
        at = chance.randrange(len(words))
        revised = " ".join([*words[:at], "revised", *words[at:]]) + "\n"
        return [{**record, "damage": ""}, {"id": f"{name} (v2)", "text": revised, "damage": kind}]
    return [record]
