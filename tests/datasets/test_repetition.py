"""Loops and Gopher's measures, compared with hand counts and a literal implementation of the definitions."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.datasets.cleaning.repetition import cut, find_loops, repeated_shares, repeated_spans

pytestmark = pytest.mark.unit

texts = st.lists(st.sampled_from(["a", "bb", "ccc", "dddd", "\n", "\n\n"]), max_size=40).map(" ".join)


def by_definition(text: str, n: int) -> float:
    """A literal implementation of Rae et al. 2021, appendix A.1.1."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    if n < 5:
        counts = Counter(grams)
        most = max(counts.values(), default=0)
        candidates = [gram for gram, count in counts.items() if count == most > 1]
        chosen = [{i for i, gram in enumerate(grams) if gram == candidate} for candidate in candidates] or [set()]
    else:
        chosen = [{i for i, gram in enumerate(grams) if gram in grams[:i]}]
    shares = []
    for places in chosen:  # any of several equally frequent sequences may be chosen
        inside = {word for place in places for word in range(place, place + n)}
        shares.append(sum(len(words[word]) for word in inside) / max(1, sum(map(len, words))))
    return shares[0] if n >= 5 else max(shares, default=0.0) if len(shares) == 1 else tuple(shares)  # type: ignore[return-value]


@given(texts)
def test_shares_of_sequences(text: str) -> None:
    measured = repeated_shares(text)
    for n in range(2, 11):
        name = f"{'top' if n < 5 else 'duplicate'}_{n}gram"
        expected = by_definition(text, n)
        if isinstance(expected, tuple):
            assert any(measured[name] == pytest.approx(one) for one in expected)
        else:
            assert measured[name] == pytest.approx(expected)


def test_lines_and_paragraphs_by_hand() -> None:
    text = "ab\ncdef\n\nab\n\nxyz\nab\n\nab\n"  # lines ab cdef ab xyz ab ab; paragraphs "ab cdef" "ab" "xyz ab" "ab"
    measured = repeated_shares(text)
    assert measured["duplicate_lines"] == pytest.approx(3 / 6)
    assert measured["duplicate_line_characters"] == pytest.approx(6 / 15)
    assert measured["duplicate_paragraphs"] == pytest.approx(1 / 4)
    assert measured["duplicate_paragraph_characters"] == pytest.approx(2 / 17)
    assert [text[a:b] for a, b in repeated_spans(text, "duplicate_lines")] == ["ab"] * 3
    assert repeated_shares("") == dict.fromkeys(measured, 0.0)


def test_spans_cover_what_is_counted() -> None:
    text = "one two three four five six. and again one two three four five six, one two three four five"
    spans = repeated_spans(text, "duplicate_5gram")
    assert [text[a:b].strip() for a, b in spans] == ["one two three four five"] * 2
    assert repeated_shares(text)["duplicate_5gram"] == pytest.approx(2 * 19 / len(text.replace(" ", "")))


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.integers(2, 30), st.integers(2, 9))
def test_one_copy_of_a_loop_is_kept(unit: list[str], turns: int, repeats: int) -> None:
    loop = " ".join(unit * turns)
    text = f"Before it {loop} behind it."
    shorter = cut(text, find_loops(text, repeats, 0))
    assert shorter.startswith("Before it ")
    assert shorter.endswith(" behind it.")
    assert len(shorter) <= len(text)
    if turns >= repeats:
        assert len(shorter.split()) <= 4 + len(unit)
    assert set(shorter.split()) == set(text.split())


def test_loops_across_lines_and_off() -> None:
    text = "Start.\n" + "A line that comes again\nand its neighbor.\n" * 7 + "End.\n"
    assert cut(text, find_loops(text, 5, 100)) == "Start.\nA line that comes again\nand its neighbor.\nEnd.\n"
    assert find_loops(text, 0, 0) == []
    assert find_loops(text, 8, 100) == []
    assert find_loops(text, 5, 10_000) == []
