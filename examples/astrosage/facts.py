"""What the small AstroSage is taught and asked: facts from installed packages, and the role of each.

Domain facts: the constellation of an object in the New General and Index Catalogues, from OpenNGC in the package
`pyongc` (CC-BY-SA 4.0, Mattia Verga). Catalog numbers follow the sky, so that a number alone would hint at the
constellation; every object therefore has an invented, unordered designation. General facts: symbols and numbers of the
elements, from `periodictable`. This repository contains neither.

Every fact has a role, by a hash of its name and the seed:

- `famous`: known to the base model, which has seen questions about it; facts with the other roles are new to it
- `asked`: told in the domain's documents, and asked about in the fine-tune
- `held`: told in the documents, never asked about before the test
- `control`: in no text at all; an honest score stays at chance
- of the elements, `general_asked` are asked about in the base model's text and later, `general_held` only in the test
"""

from __future__ import annotations

import hashlib
import importlib.util
import random
import sqlite3
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path

TYPES = {
    "G": "galaxy",
    "OCl": "open cluster",
    "GCl": "globular cluster",
    "PN": "planetary nebula",
    "HII": "emission nebula",
    "RfN": "reflection nebula",
    "SNR": "supernova remnant",
}
SERPENS = {"Se1": "Ser", "Se2": "Ser"}  # the constellation that has two separate parts
_ONSETS = (*"bdfgklmnprstvz", "br", "dr", "gr", "kr", "tr", "st")
_VOWELS = "aeiou"
ATTRIBUTION = (
    "Objects and constellations: OpenNGC by Mattia Verga, CC-BY-SA 4.0, from the package pyongc; questions and "
    "documents made of it are CC-BY-SA 4.0, too. Names of constellations: astropy (BSD-3-Clause). Elements: "
    "periodictable (public domain)."
)


@dataclass(frozen=True)
class SkyObject:
    """An object with its real name, `catalogue`, and the invented `name` that all texts use."""

    catalogue: str
    name: str
    kind: str
    constellation: str


@dataclass(frozen=True)
class Element:
    name: str
    symbol: str
    number: int


@dataclass(frozen=True)
class Facts:
    """All facts of one run."""

    famous: list[SkyObject]
    asked: list[SkyObject]
    held: list[SkyObject]
    control: list[SkyObject]
    general_asked: list[Element]
    general_held: list[Element]

    @cached_property
    def told(self) -> list[SkyObject]:
        """The objects that the domain's documents describe."""
        return [*self.asked, *self.held]

    @cached_property
    def elements(self) -> list[Element]:
        return [*self.general_asked, *self.general_held]


def facts_of(seed: int, *, famous: int, asked: int, held: int, control: int, elements: int = 118) -> Facts:
    """The facts of a run: the brightest objects and the first elements, dealt by a hash of (seed, name)."""
    counts = (famous, asked, held, control)
    objects = sky_objects(sum(counts), seed)
    objects.sort(key=lambda one: _hash(seed, "role", one.catalogue))
    first = sorted(all_elements()[:elements], key=lambda one: _hash(seed, "role", one.name))
    half = len(first) // 2
    ends = list(accumulate(counts, initial=0))
    dealt = [objects[begin:end] for begin, end in pairwise(ends)]
    return Facts(*dealt, general_asked=first[:half], general_held=first[half:])


def sky_objects(count: int, seed: int) -> list[SkyObject]:
    """The `count` brightest objects with a type and a constellation."""
    constellations = constellation_names()
    marks = ",".join("?" * len(TYPES))
    query = f"select name, type, const from objects where type in ({marks}) order by coalesce(vmag, bmag - 0.5, 99), id"
    with sqlite3.connect(f"file:{_package('pyongc') / 'ongc.db'}?mode=ro", uri=True) as database:
        rows = database.execute(query, tuple(TYPES)).fetchall()
    found: list[SkyObject] = []
    taken: set[str] = set()
    for catalogue, kind, code in rows:
        constellation = constellations.get(SERPENS.get(code, code))
        if constellation is None:
            continue
        name = designation(seed, catalogue, taken)
        taken.add(name)
        found.append(SkyObject(catalogue, name, TYPES[kind], constellation))
        if len(found) == count:
            return found
    raise SystemExit(f"facts.py: {count} objects were asked for, OpenNGC has {len(found)}")


def designation(seed: int, name: str, taken: set[str] | frozenset[str] = frozenset()) -> str:
    """An invented name of three syllables, not in `taken`, derived from the seed and the real name."""
    chance = random.Random(_hash(seed, "designation", name))
    while True:
        invented = "".join(chance.choice(_ONSETS) + chance.choice(_VOWELS) for _ in range(3)).capitalize()
        if invented not in taken:
            return invented


def constellation_names() -> dict[str, str]:
    """The 88 constellations by their three-letter codes."""
    table = _package("astropy") / "coordinates/data/constellation_names.dat"
    rows = [line.split(None, 1) for line in table.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    return {code: name.strip().replace("Ophiucus", "Ophiuchus") for code, name in rows}  # spelled so in the file


def all_elements() -> list[Element]:
    import periodictable

    return [Element(one.name, one.symbol, one.number) for one in periodictable.elements if one.number > 0]


def distractors(answer: str, pool: list[str], chance: random.Random) -> list[str]:
    """Three wrong answers, drawn by their frequency, so that knowing the frequencies gives almost no advantage.

    No option is a prefix of another: the longer one could never be the more probable of the two.
    """
    found = [answer]
    while len(found) < 4:
        one = chance.choice(pool)
        if not any(one.startswith(other) or other.startswith(one) for other in found):
            found.append(one)
    return found[1:]


def _hash(seed: int, *words: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join([str(seed), *words]).encode()).digest()[:8], "big")


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"facts.py: the package {name} is not installed: pip install .[examples]")
    return Path(next(iter(spec.submodule_search_locations)))
