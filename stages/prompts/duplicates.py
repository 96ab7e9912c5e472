"""Exact and near duplicates among the texts of one language; the first one stays.

Near duplicates: MinHash over character 5-grams with locality-sensitive hashing (rensa's R-MinHash, Fast Similarity
Sketching, arXiv 1704.04370). A text is dropped when its estimated Jaccard similarity to one that stayed reaches the
threshold; the estimate's standard deviation is at most 0.045 (128 hashes). Deterministic: fixed seed, order of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from rensa import RMinHash, RMinHashDeduplicator

from stages.text.messages import comparable

_HASHES = 128
_GRAM = 5
_RECALL = 0.99
_SEED = 0


@dataclass(frozen=True)
class TextKey:
    """What a text is compared by: a digest of the whole, and a MinHash sketch for near duplicates."""

    digest: bytes
    sketch: RMinHash | None


def keys_of(texts: Sequence[str], full: Sequence[str], near: bool) -> list[TextKey]:
    """The keys of texts, computed apart from the comparing, so that several processes can.

    full: what must be equal for an exact duplicate (texts with their system messages). texts: what is compared by
    similarity, if near duplicates are looked for.
    """
    digests = [blake2b(comparable(whole).encode("utf-8", "replace"), digest_size=16).digest() for whole in full]
    grams = [_grams(comparable(text)) for text in texts] if near else []
    sketches = RMinHash.from_token_sets(grams, _HASHES, _SEED) if near else [None] * len(digests)
    return [TextKey(digest, sketch) for digest, sketch in zip(digests, sketches, strict=True)]


class Deduplicator:
    """Remembers the texts of one language that stayed. About 2 kB a text, or 0.1 kB with threshold 1 (exact only)."""

    def __init__(self, threshold: float) -> None:
        self._exact: dict[bytes, str] = {}
        self._ids: list[str] = []
        self._near: RMinHashDeduplicator | None = None
        if threshold < 1:
            self._near = RMinHashDeduplicator(threshold, _HASHES, use_lsh=True, num_bands=bands(threshold), seed=_SEED)

    def check(self, row_id: str, key: TextKey) -> tuple[str, str] | None:
        """None if the text stays, else (reason, id of what it duplicates). Reasons: duplicate, near_duplicate."""
        if key.digest in self._exact:
            return "duplicate", self._exact[key.digest]
        if self._near is not None and not self._near.add(str(len(self._ids)), key.sketch):
            first = min(map(int, self._near.get_duplicates(key.sketch)))
            return "near_duplicate", self._ids[first]
        self._exact[key.digest] = row_id
        self._ids.append(row_id)
        return None


def _grams(text: str) -> list[str]:
    return [text[i : i + _GRAM] for i in range(max(1, len(text) - _GRAM + 1))]


def bands(threshold: float) -> int:
    """Fewest bands (b of r = 128/b rows each) that find a pair at the threshold with 99%: 1 - (1 - t^r)^b."""
    for count in (2, 4, 8, 16, 32, 64):
        if 1 - (1 - threshold ** (_HASHES // count)) ** count >= _RECALL:
            return count
    return _HASHES
