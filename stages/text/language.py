"""Which language a text is in: py3langid (naive Bayes over byte n-grams, about 140 languages), told the run's languages.

Short texts are hard among 140 languages and easy among a dozen, so the confidence of a run's language is its probability
among the run's languages. A text in a language the run does not have would then pass as its nearest relative, and in a
run of one language everything would pass; hence a text is taken for another language when all the run's languages
together get at most INSIDE of the probability among all that the identifier knows. Its confidence is then what it has among
all: "Generate a haiku poem." is Sesotho there with 0.11.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from schemas.languages import UNKNOWN, base_language, macrolanguage
from stages.text.codes import counts_for, same_language
from stages.text.scripts import script_in

__all__ = ["UNKNOWN", "Guess", "base_language", "guess", "identify", "same_language", "unidentifiable"]

INSIDE = 0.05
"""Measured on the prompts and authored pairs in data/ (962 texts, 13 languages, each left out of the run in turn): finds
99.8% of the texts in the language left out, and takes none of the others for outside; 97% and none at their first 30
characters. (Asking for one language outside with probability 0.7 instead finds 97.9% and, at 30 characters, 83%.) Those have
few near relatives; of a row's two texts, stages.text.assign lets one outside decide for the other."""

_LONGEST = 2000  # characters looked at
_NOT_A_LANGUAGE = "zxx"
_NO_PROSE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]+`|(?:https?|ftp)://\S+|www\.\S+|\S+@\S+\.\S+|<[^<>\n]{1,200}>|\\[A-Za-z]+|\$[^$\n]{1,200}\$",
    re.DOTALL,
)
_STAND_INS = {("pa", "Arab"): ("ur", "lah", "pnb")}
"""(language, script) that the identifier has not seen -> what it takes such texts for. Others in a script of their own are
told by their macrolanguage (ku-Arab is sdh to it, sr-Latn sr, hr or bs) or right at once (uz-Cyrl)."""


@dataclass(frozen=True)
class Guess:
    """What the identifier says of a text.

    code: base language, und where nothing in the text says one. confidence: its probability among the run's languages, or
    among all if it is none of them. alone: its probability among all. outside: languages that are not the run's which it may
    be in as well, with their probability among all (over INSIDE).
    """

    code: str
    confidence: float
    alone: float
    outside: Mapping[str, float] = field(default_factory=dict)


def unidentifiable(languages: Sequence[str]) -> list[str]:
    """Those languages that py3langid does not know: nothing may be dropped for its language there."""
    labels = _labels()
    return [language for language in languages if not any(same_language(label, language) for label in labels)]


def identify(texts: Sequence[str], candidates: Sequence[str] = ()) -> list[tuple[str, float]]:
    """(code, confidence) of `guess` for each text."""
    return [(found.code, found.confidence) for found in guess(texts, candidates)]


def guess(texts: Sequence[str], candidates: Sequence[str] = ()) -> list[Guess]:
    """The language of each text; ("und", 0) for a text without a letter outside of code, addresses and formulas.

    candidates: the run's languages (BCP 47). Only the first 2,000 characters count. Deterministic.
    """
    owners, stand_ins = _owners(tuple(candidates)), _stand_ins(tuple(candidates))
    inside = {base_language(code) for code in candidates}
    return [_one(prose(text[:_LONGEST]), owners, inside, stand_ins) for text in texts]


def prose(text: str) -> str:
    """The text less code between backticks, addresses, tags and formulas, which are in no language."""
    return _NO_PROSE.sub(" ", text) if any(mark in text for mark in "`<$@\\/.") else text


def _one(text: str, owners: Mapping[str, str], inside: set[str], stand_ins: Mapping[tuple[str, str], str]) -> Guess:
    if not any(character.isalpha() for character in text):
        return Guess(UNKNOWN, 0.0, 0.0)
    probability: dict[str, float] = {}
    for label, value in _identifier().rank(text):
        if label != _NOT_A_LANGUAGE:
            probability[owners[label]] = probability.get(owners[label], 0.0) + value
    best = max(probability, key=lambda language: probability[language])
    if stand_ins and (own := stand_ins.get((best, script_in(text) or ""))) is not None:
        probability[own] = probability.pop(best) + probability.get(own, 0.0)
        best = own
    known = {language: value for language, value in probability.items() if language in inside}
    total = sum(known.values())
    outside = {language: value for language, value in probability.items() if language not in known and value > INSIDE}
    if best in known or total > INSIDE:
        best = max(known, key=lambda language: known[language])
        return Guess(best, min(1.0, known[best] / total), min(1.0, probability[best]), outside)
    return Guess(best, min(1.0, probability[best]), min(1.0, probability[best]), outside)


@lru_cache(maxsize=64)
def _stand_ins(candidates: tuple[str, ...]) -> dict[tuple[str, str], str]:
    """(what the identifier says, script) -> the run's language it stands for."""
    bases = {base_language(code) for code in candidates}
    found = {}
    for (language, script), codes in _STAND_INS.items():
        if any(base_language(code) == language and f"-{script}" in code for code in candidates):
            found.update({(code, script): language for code in codes if code not in bases})
    return found


@lru_cache(maxsize=64)
def _owners(candidates: tuple[str, ...]) -> dict[str, str]:
    """Label of the identifier -> the base language it counts for: a candidate's if it is the same, else its own.

    A candidate without a label of its own also has its macrolanguage's other members' (Croatian and Bosnian are Serbian's
    in a run of sr-Latn alone).
    """
    bases = list(dict.fromkeys(base_language(code) for code in candidates))
    scripted = {base_language(code) for code in candidates if "-Latn" in code or "-Cyrl" in code or "-Arab" in code}
    owners = {}
    for label in _labels():
        base = base_language(label)
        related = [candidate for candidate in bases if _is_of(base, candidate, candidate in scripted)]
        if related:
            without_label = [candidate for candidate in related if candidate not in _labels()]
            owners[label] = base if base in related else (without_label or related)[0]
        else:
            owners[label] = macrolanguage(base) if macrolanguage(base) in _labels() else base
    return owners


def _is_of(label: str, candidate: str, scripted: bool) -> bool:
    if {label, candidate} == {"id", "ms"}:
        return False
    near = same_language(label, candidate) and (scripted or candidate not in _labels())
    return counts_for(label, candidate) or near


@lru_cache(maxsize=1)
def _labels() -> tuple[str, ...]:
    return tuple(label for label in _identifier().labels if label != _NOT_A_LANGUAGE)


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
