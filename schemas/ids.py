"""Content ids: the same content has the same id on every machine and in every run."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def content_id(*parts: Any) -> str:
    """128-bit BLAKE2b of the canonical JSON of `parts`, as 32 hex digits."""
    return hashlib.blake2b(canonical_json(parts).encode(), digest_size=16).hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def seed_for(*parts: Any) -> int:
    """A 63-bit seed keyed by `parts` (run seed, round, prompt_id, index, ...)."""
    digest = hashlib.blake2b(canonical_json(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def unit_interval(*parts: Any) -> float:
    """A number in [0, 1) keyed by `parts`: used to split translation groups reproducibly."""
    return seed_for(*parts) / 2.0**63
