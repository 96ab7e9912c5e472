"""Which language code stands for which, and in what script it is written (`schemas.languages` reads codes and names)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

import langcodes

from schemas.languages import base_language, macrolanguage

_HUB = re.compile(r"(?!und$)[a-z]{2,3}")


def hub_codes(codes: Iterable[str]) -> list[str]:
    """What a card on the hub lists of `codes`: primary subtags, each once; an unknown language is none."""
    return list(dict.fromkeys(filter(_HUB.fullmatch, (code.partition("-")[0] for code in codes))))


def counts_for(code: str, language: str) -> bool:
    """Whether texts in `code` are texts in `language`: the same base language, or one is the other's macrolanguage."""
    one, other = base_language(code), base_language(language)
    if langcodes.standardize_tag(one) == langcodes.standardize_tag(other):
        return True
    over_one, over_other = macrolanguage(one), macrolanguage(other)
    if (one, other) == (
        "ms",
        "id",
    ):  # a macrolanguage that Indonesian is a member of, and a language beside it to everyone
        return False
    return over_one == over_other and (over_one == one or over_other == other)


def same_language(detected: str, language: str) -> bool:
    """Whether two codes are of one macrolanguage (zh-Hans and yue, arz and ary): too near to hold one against the other."""
    return macrolanguage(detected) == macrolanguage(language)


@lru_cache(maxsize=1024)
def script_of(code: str) -> str | None:
    """The script that the code names, or that the language is most often written in; None if nobody knows."""
    found = langcodes.Language.get(code)
    return found.script or found.maximize().script


@lru_cache(maxsize=1024)
def names_script(code: str) -> bool:
    """Whether the code itself names a script: zh-Hant does, zh does not."""
    return langcodes.Language.get(code).script is not None


_WELL_KNOWN = frozenset(
    (("zh", "Hant"), ("sr", "Latn"), ("uz", "Cyrl"), ("ku", "Arab"), ("pa", "Arab"), ("yue", "Hans"))
)


@lru_cache(maxsize=1024)
def unusual_script(code: str) -> bool:
    """Whether the code names a script that its language is seldom written in, so that the identifier has not seen it.

    Serbian in Latin letters, Uzbek in Cyrillic and the like it was seen to tell (stages.text.language).
    """
    if not names_script(code):
        return False
    base, script = base_language(code), script_of(code)
    return script != script_of(base) and (base, script) not in _WELL_KNOWN


def in_order(languages: Sequence[str], found: Sequence[str]) -> list[str]:
    """`found` without repeats: languages of the run in the config's order, then others by name."""
    known = [language for language in languages if language in set(found)]
    return known + sorted(set(found) - set(known))
