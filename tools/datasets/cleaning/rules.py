"""The rules of `clean_corpus.py` and their thresholds: defaults, overridden by a YAML file, then by flags."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from megatron.data.indexed import DataError


def _rule(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Rules:
    """One field per rule; a dropped document is reported under the field's name. Fractions refer to a document's
    characters (without white space) unless stated otherwise, and 1 disables the rule.

    The `max_duplicate_*` and `max_top_*` defaults are those of Gopher (Rae et al. 2021, table A1).
    """

    unicode: bool = _rule(True, "repair mis-decoded text, ligatures and control characters with ftfy")
    loop_repeats: int = _rule(5, "keep one copy of text repeated this many times in a row or more; 0 disables")
    loop_characters: int = _rule(100, "keep loops shorter than this")
    max_loops: float = _rule(0.3, "drop documents of which more than this fraction was cut as loops")
    min_characters: int = _rule(200, "drop documents shorter than this after repair")
    max_replacement: float = _rule(0.005, "drop documents with a larger fraction of U+FFFD or private-use characters")
    max_duplicate_lines: float = _rule(0.30, "fraction of lines that are duplicates")
    max_duplicate_paragraphs: float = _rule(0.30, "fraction of paragraphs that are duplicates")
    max_duplicate_line_characters: float = _rule(0.20, "fraction in duplicate lines")
    max_duplicate_paragraph_characters: float = _rule(0.20, "fraction in duplicate paragraphs")
    max_top_2gram: float = _rule(0.20, "share in the most frequent sequence of 2 words")
    max_top_3gram: float = _rule(0.18, "share in the most frequent sequence of 3 words")
    max_top_4gram: float = _rule(0.16, "share in the most frequent sequence of 4 words")
    max_duplicate_5gram: float = _rule(0.15, "share in sequences of 5 words that were there before")
    max_duplicate_6gram: float = _rule(0.14, "share in sequences of 6 words that were there before")
    max_duplicate_7gram: float = _rule(0.13, "share in sequences of 7 words that were there before")
    max_duplicate_8gram: float = _rule(0.12, "share in sequences of 8 words that were there before")
    max_duplicate_9gram: float = _rule(0.11, "share in sequences of 9 words that were there before")
    max_duplicate_10gram: float = _rule(0.10, "share in sequences of 10 words that were there before")
    min_perplexity: float = _rule(0.0, "drop documents with a lower perplexity under --perplexity-model (boilerplate)")
    max_perplexity: float = _rule(float("inf"), "drop documents with a higher perplexity (noise)")
    exact_duplicate: bool = _rule(True, "drop exact duplicates, ignoring case, punctuation and white space")
    near_duplicate: float = _rule(
        0.8, "drop documents at least this similar (Jaccard, 5-word shingles) to an earlier one; 0 disables"
    )

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Rules).items():
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            right = isinstance(value, bool) if kind is bool else number and (kind is float or value == int(value))
            if not right:
                raise DataError(f"rule {name}: {value!r} is not {'true or false' if kind is bool else 'a number'}")
            if kind is not bool and not value >= 0:
                raise DataError(f"rule {name}: {value} is less than 0")
        for name in self.shares():
            if getattr(self, name) > 1:
                raise DataError(f"rule {name}: {getattr(self, name)} is more than 1, but it is a fraction")
        if 0 < self.near_duplicate < 0.3:
            raise DataError(
                f"rule near_duplicate: {self.near_duplicate} would match dissimilar texts; the minimum is 0.3"
            )
        if self.loop_repeats == 1:
            raise DataError(
                "rule loop_repeats: 1 would make everything a loop; the minimum is 2, and 0 disables the rule"
            )

    @staticmethod
    def shares() -> list[str]:
        """The rules whose threshold is a fraction."""
        return ["near_duplicate"] + [
            f.name for f in dataclasses.fields(Rules) if f.name.startswith("max_") and f.name != "max_perplexity"
        ]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag per rule. Flags that are not given are absent from the namespace."""
    group = parser.add_argument_group("rules", "a dropped document is reported under the name of its rule")
    for item in dataclasses.fields(Rules):
        text = f"{item.metadata['help']} (default: {item.default})"
        name = "--" + item.name.replace("_", "-")
        if isinstance(item.default, bool):
            group.add_argument(name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            group.add_argument(name, type=type(item.default), default=argparse.SUPPRESS, help=text)


def read_rules(path: Path | None, options: argparse.Namespace) -> Rules:
    """The defaults, overridden by a YAML file `rule: threshold`, then by flags. Raises DataError, OSError."""
    names = [item.name for item in dataclasses.fields(Rules)]
    given: Any = {}
    if path is not None:
        try:
            given = yaml.safe_load(path.read_text()) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not YAML: {error}") from None
        if not isinstance(given, dict):
            raise DataError(f"{path}: expected lines of `rule: threshold`, got {type(given).__name__}")
    unknown = [str(name) for name in given if name not in names]
    if unknown:
        raise DataError(f"{path}: unknown rule {', '.join(unknown)}; the rules are {', '.join(names)}")
    return Rules(**{**given, **{name: getattr(options, name) for name in names if hasattr(options, name)}})
