"""Whether an answer refuses: it begins with a phrase of data/refusals/phrases.yaml, whose README says how crude that is."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

import yaml

from stages.data import read_data
from stages.text.codes import base_language, macrolanguage

_PHRASES = "refusals/phrases.yaml"
_EVERYWHERE = "en"
_OPENING = 200  # characters of the answer that are looked at
_GAP = r"[^.!?。।\n]{0,60}"
_SIGNS = re.compile(r"[*_#>`\"“”„«»「」]")
_APOSTROPHES = re.compile("[’‘ʼ´]")
_SPACE = re.compile(r"\s+")
_SPACED_SCRIPTS = "\u0530"
"""Letters before it (Latin, Greek, Cyrillic) stand in words with spaces between: a phrase begins a word there."""


def refusal(text: str, language: str) -> str:
    """The phrase of a refusal that an answer in `language` (BCP 47) begins with, as it stands there; empty if there is none."""
    opening = _plain(text[: 4 * _OPENING])[:_OPENING]
    for code in dict.fromkeys([_listed(language), _EVERYWHERE]):
        if code and (found := _pattern(code).search(opening)):
            return found.group().strip()
    return ""


def without_phrases(languages: Iterable[str]) -> list[str]:
    """Those languages that have no list: only refusals in English are found there."""
    return [language for language in languages if not _listed(language)]


def _plain(text: str) -> str:
    """Lower case, NFKC, straight apostrophes, no Markdown signs or quotation marks, one space at a time."""
    text = _APOSTROPHES.sub("'", text)
    text = unicodedata.normalize("NFKC", _SIGNS.sub("", text)).casefold()
    return _SPACE.sub(" ", unicodedata.normalize("NFKC", text)).strip()


@lru_cache(maxsize=1024)
def _listed(language: str) -> str:
    codes = (base_language(language), macrolanguage(language))
    return next((code for code in codes if code in _phrases()), "")


@lru_cache(maxsize=1)
def _phrases() -> dict[str, list[str]]:
    found: dict[str, list[str]] = yaml.safe_load(read_data(_PHRASES))
    return found


@lru_cache(maxsize=64)
def _pattern(code: str) -> re.Pattern[str]:
    return re.compile("|".join(map(_expression, _phrases()[code])))


def _expression(phrase: str) -> str:
    """`*` is a gap within a sentence, and takes the spaces around it."""
    words = _GAP.join(re.escape(_plain(part)) for part in phrase.split("*"))
    return rf"(?<![^\W\d_]){words}" if phrase[0] < _SPACED_SCRIPTS else words
