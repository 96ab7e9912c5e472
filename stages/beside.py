"""Columns of data sets that say something, and that nothing reads unless the config or the user does something about it."""

from __future__ import annotations

from collections.abc import Sequence

_BETTER = "it says which answer is better: write chosen and rejected of it, docs/own-pairs.md"
_ASKED = "part of what is asked: put it into the prompt, docs/own-pairs.md"
_LEFT_OUT = "no part of what is learnt"
_KNOWN = {
    **dict.fromkeys(("input", "history"), _ASKED),
    "split": "`fields.split` of prompts and pairs reads it",
    **dict.fromkeys(("label", "labels", "better_response_id", "overall_preference"), _BETTER),
    **dict.fromkeys(("image", "images", "tools"), _LEFT_OUT),
}
_BEGINNINGS = {"system": "`fields.system` reads one", "winner": _BETTER}


def unread_columns(present: Sequence[str], wanted: Sequence[str]) -> str | None:
    """What to say of well-known columns that a file has and nothing reads, with what to do about each; None: there are none."""
    found = []
    for name in present:
        begun = next((advice for start, advice in _BEGINNINGS.items() if name.lower().startswith(start)), None)
        advice = _KNOWN.get(name.lower(), begun)
        if advice is not None and name not in wanted:
            found.append(f"{name[:80]} ({advice})")
    return f"columns that are not read: {', '.join(found)}" if found else None
