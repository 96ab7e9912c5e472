"""How much a text repeats itself."""

from __future__ import annotations

_RUN = 16


def repetition(text: str) -> float:
    """Share of a text's runs of 16 characters that occurred in it before: near 0 for prose in any script, near 1 for a loop."""
    runs = [text[at : at + _RUN] for at in range(len(text) - _RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
