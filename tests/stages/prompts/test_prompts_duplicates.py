from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.prompts.duplicates import Deduplicator, bands, keys_of

WORDS = ["".join(random.Random(i).choices("abcdefghijklmnop", k=2 + i % 7)) for i in range(3000)]


def grams(text: str) -> set[str]:
    return {text[i : i + 5] for i in range(max(1, len(text) - 4))}


def check(deduplicator: Deduplicator, ids: list[str], texts: list[str], near: bool = True) -> list[object]:
    return [deduplicator.check(row_id, key) for row_id, key in zip(ids, keys_of(texts, texts, near), strict=True)]


def jaccard(one: str, other: str) -> float:
    return len(grams(one) & grams(other)) / len(grams(one) | grams(other))


def altered(text: str, similarity: float, rng: random.Random) -> str:
    other = text
    while jaccard(text, other) > similarity:
        place = rng.randrange(len(other))
        other = other[:place] + "#" + other[place + 1 :]
    return other


@pytest.mark.parametrize(
    ("threshold", "similarity", "least", "most"),
    [(0.8, 0.93, 0.99, 1), (0.8, 0.6, 0, 0.01), (0.5, 0.68, 0.97, 1), (0.95, 0.8, 0, 0.01)],
)
def test_pairs_are_found_by_their_exact_jaccard_similarity(
    threshold: float, similarity: float, least: float, most: float
) -> None:
    rng = random.Random(1)
    texts = [" ".join(rng.choices(WORDS, k=40)) for _ in range(300)]
    twins = [altered(text, similarity, rng) for text in texts]
    deduplicator = Deduplicator(threshold)
    assert check(deduplicator, [f"t{i}" for i in range(300)], texts) == [None] * 300
    verdicts = check(deduplicator, [f"u{i}" for i in range(300)], twins)
    found = [verdict for verdict in verdicts if verdict]
    assert least <= len(found) / 300 <= most
    assert all(verdict is None or verdict == ("near_duplicate", f"t{i}") for i, verdict in enumerate(verdicts))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=12))
def test_without_near_duplicates_exactly_the_repeated_texts_go(texts: list[str]) -> None:
    import unicodedata

    keys = [" ".join(unicodedata.normalize("NFC", text.casefold()).split()) for text in texts]
    verdicts = check(Deduplicator(1.0), [str(i) for i in range(len(texts))], texts, near=False)
    for i, verdict in enumerate(verdicts):
        first = keys.index(keys[i])
        assert verdict == (None if first == i else ("duplicate", str(first)))


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 0.99])
def test_bands_find_a_pair_at_the_threshold(threshold: float) -> None:
    count = bands(threshold)
    assert 128 % count == 0
    assert 1 - (1 - threshold ** (128 // count)) ** count >= 0.99 or count == 128
