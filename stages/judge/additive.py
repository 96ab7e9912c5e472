"""The additive 5-point rubric with reasoning (Self-Rewarding Language Models, arXiv 2401.10020, figure 2)."""

from __future__ import annotations

import re

_SCORE = re.compile(r"score\W{0,6}?[:：]\W{0,6}?(-?\d+(?:[.,]\d+)?(?:[-–~]\d+)?)", re.IGNORECASE)


def parse_vote(text: str, finish_reason: str) -> float | None:
    """The last `Score: k` of a judge's reply, k a whole number from 0 to 5; None for anything else.

    A reply cut by the token limit is not parsed: its last score need not be the verdict. Nothing is guessed.
    """
    found = _SCORE.findall(text)
    if finish_reason != "stop" or not found or not re.fullmatch(r"[0-5]", found[-1]):
        return None
    return float(found[-1])
