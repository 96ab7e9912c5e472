"""Columns of data sets that say something, and that nothing reads unless the config or the user does something about it."""

from __future__ import annotations

import re
from collections.abc import Sequence

_BETTER = "it says which answer is better: write chosen and rejected of it, docs/own-pairs.md"
_ASKED = "part of what is asked: put it into the prompt, docs/own-pairs.md"
_LEFT_OUT = "no part of what is learnt"
_SPOKEN = "`fields.language` reads one"
_SURE = "it may say how sure a preference is, or that there is none: leave such rows out of the data"
_KNOWN = {
    **dict.fromkeys(("input", "history", "context", "initial_reason_steps"), _ASKED),
    "split": "`fields.split` of prompts and pairs reads it",
    **dict.fromkeys(("language", "lang", "locale", "language_code", "lang_code"), _SPOKEN),
    **dict.fromkeys(("label", "labels", "better_response_id", "overall_preference", "preference", "choice"), _BETTER),
    **dict.fromkeys(("preference_strength", "tie", "status"), _SURE),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios", "tools"), _LEFT_OUT),
}
_BEGINNINGS = {"system": "`fields.system` reads one", "winner": _BETTER}
_SCORE = re.compile(
    r"(?:(?:score|rating|reward)s?[ _-](chosen|rejected)|(chosen|rejected)[ _-](?:score|rating|reward)s?)"
)
_FOLDER = re.compile(r"(?:^|/)((?:language|lang|locale|language_code|lang_code)=[^/]+)/", re.IGNORECASE)


def unread_columns(present: Sequence[str], wanted: Sequence[str]) -> str | None:
    """What to say of well-known columns that a file has and nothing reads, with what to do about each; None: there are none."""
    found = []
    for name in present:
        begun = next((advice for start, advice in _BEGINNINGS.items() if name.lower().startswith(start)), None)
        if (rated := _SCORE.fullmatch(name.lower())) is not None:
            begun = f"`fields.{rated.group(1) or rated.group(2)}_score` reads one"
        advice = _KNOWN.get(name.lower(), begun)
        if advice is not None and name not in (*wanted, "language"):
            found.append(f"{name[:80]} ({advice})")
    return f"columns that are not read: {', '.join(found)}" if found else None


def unread_folder(path: str) -> str | None:
    """What to say of a file in a folder that names its language, as Hive's do (language=de/0.parquet); None: it is in none."""
    found = _FOLDER.search(path)
    return found and f"{found.group(1)[:80]} in the path is not read: name a source for each `language`"
