"""The language of a task: declared, or read from what its settings or its name say ("belebele_deu_Latn", "mgsm_direct_es")."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from schemas.languages import UNKNOWN, base_language, named, standard
from stages.text.codes import counts_for, names_script, script_of

_WORDS = re.compile(r"[^A-Za-z]+")
_SCRIPT_OR_COUNTRY = re.compile(r"[A-Z][a-z]{3}|[A-Z]{2}")


def language_of(texts: Iterable[str], run: Sequence[str]) -> str:
    """The language that `texts` (what a task says of itself, the surest first) name: one of the run's, where one and only one of
    them is named; else what the last word of a text names beyond doubt; else und.

    Nearly every word of three letters is a code of some language ("arc", "nli"), so only the run's are looked for everywhere.
    """
    texts = list(texts)
    for text in texts:
        mine = {code for found in _codes(text) for code in run if _is(found, code)}
        if len(mine) == 1:
            return mine.pop()
        if mine:
            return UNKNOWN
    return next((code for text in texts if (code := _last(text)) is not None), UNKNOWN)


def _codes(text: str) -> Iterator[str]:
    """Codes that the words of a text may be; a script or country is taken with the word before it."""
    words = [word for word in _WORDS.split(text) if word]
    for n, word in enumerate(words):
        if n and _SCRIPT_OR_COUNTRY.fullmatch(word):
            continue
        following = words[n + 1] if n + 1 < len(words) and _SCRIPT_OR_COUNTRY.fullmatch(words[n + 1]) else ""
        code = (standard(f"{word}-{following}") if following else None) or _word(word)
        if code is not None:
            yield code


def _word(word: str) -> str | None:
    return standard(word) if len(word) <= 3 else named(word)


def _last(text: str) -> str | None:
    words = [word for word in _WORDS.split(text) if word]
    if len(words) > 1 and len(words[-2]) <= 3 and _SCRIPT_OR_COUNTRY.fullmatch(words[-1]):
        return standard(f"{words[-2]}-{words[-1]}")
    return _word(words[-1]) if len(words) > 1 and len(words[-1]) != 3 else None


def _is(found: str, code: str) -> bool:
    if base_language(found) != base_language(code) and not counts_for(found, code):
        return False
    return not (names_script(found) and names_script(code)) or script_of(found) == script_of(code)
