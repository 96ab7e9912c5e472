"""Language codes as data sets write them: BCP 47, FLORES ("swh_Latn"), ISO 639-3, names; and which stands for which.

Macrolanguages and English names are those of the IANA registry, which follows ISO 639-3 and is part of langcodes.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache

import langcodes
from langcodes.registry_parser import parse_registry

from stages.data import read_data

UNKNOWN = "und"
_NOTE = re.compile(
    r"\s*\((?:macrolanguage|individual language|[0-9c. -]+)\)|^(?:Modern|Standard) (?=Greek)", re.IGNORECASE
)
_LOCALE = re.compile(r"\A([A-Za-z]{2,3}(?:_[A-Z]{2})?)(?:\.[\w-]{1,20})?(?:@euro)?\Z")
"""Locales as POSIX names them: "de_AT.UTF-8"."""
_HUB = re.compile(r"(?!und$)[a-z]{2,3}")
_ANY_HAN = "Hani"
_COUNTRIES = {
    **{"usa": "US", "uk": "GB", "great britain": "GB", "simplified": "Hans", "traditional": "Hant"},
    **{"简体": "Hans", "簡體": "Hans", "繁体": "Hant", "繁體": "Hant"},
}
_FULL_WIDTH = str.maketrans("（），；", "(),;")
_QUALIFIED = re.compile(r"([^()]+?) ?\(([^()]+)\)")


@lru_cache(maxsize=4096)
def standard(code: str) -> str | None:
    """The code as BCP 47 writes it ("zh-Hant" of "zho_hant"), the code of a language's name, or None.

    A name counts in English or in the language itself. Hani, Chinese characters of either kind, is no script of its own.
    """
    code = _LOCALE.sub(r"\1", code.strip())
    if len(code) > 60:
        return None
    if not langcodes.tag_is_valid(code):
        return named(code)
    found = langcodes.Language.get(langcodes.standardize_tag(code))
    if not found.is_valid():
        return named(code)
    return found.update_dict({"script": None}).to_tag() if found.script == _ANY_HAN else found.to_tag()


def named(name: str) -> str | None:
    """The code of the language of this name ("German", "Deutsch", "Spanish (Mexico)", "Serbian (Latin)"), or None.

    As ISO 639 writes them, too: "Greek, Modern (1453-)", and "Spanish; Castilian", two names of one language.
    """
    if len(parts := name.translate(_FULL_WIDTH).split(";")) > 1:
        codes = {named(part) for part in parts}
        return codes.pop() if len(codes) == 1 else None
    words = _NOTE.sub("", " ".join(parts[0].casefold().replace("_", " ").split()))
    base_name, _, before = words.partition(", ")
    if before and words not in _names():
        words = _NOTE.sub("", f"{before} {base_name}")
    qualified = _QUALIFIED.fullmatch(words)
    if words in _names() or qualified is None:
        return _names().get(words)
    base, part = _names().get(qualified.group(1)), _parts().get(qualified.group(2))
    return f"{base}-{part}" if base and part else None


@lru_cache(maxsize=4096)
def base_language(code: str) -> str:
    """The primary language subtag: "zh" of "zh-Hans", "he" of "iw"."""
    return langcodes.Language.get(code).language or UNKNOWN


def hub_codes(codes: Iterable[str]) -> list[str]:
    """What a card on the hub lists of `codes`: primary subtags, each once; an unknown language is none."""
    return list(dict.fromkeys(filter(_HUB.fullmatch, (code.partition("-")[0] for code in codes))))


@lru_cache(maxsize=4096)
def macrolanguage(code: str) -> str:
    """The base language's macrolanguage ("ar" of "arz", "zh" of "yue"), or the base language itself.

    Some codes are only aliases of another: tl is fil in CLDR, and both count as fil.
    """
    base = base_language(code)
    alias = langcodes.standardize_tag(base) if base != UNKNOWN else base
    return _macrolanguages().get(alias, alias)


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


@lru_cache(maxsize=1)
def _macrolanguages() -> dict[str, str]:
    """Individual language -> its macrolanguage, both by their preferred codes."""
    found = {
        entry["Subtag"]: entry["Macrolanguage"]
        for entry in parse_registry()
        if entry.get("Type") == "language" and "Macrolanguage" in entry
    }
    return {langcodes.standardize_tag(code): over for code, over in found.items()} | found


@lru_cache(maxsize=1)
def _parts() -> dict[str, str]:
    """Scripts and countries, casefolded, by name and by code -> the subtag."""
    entries = [
        entry for entry in parse_registry() if entry.get("Type") in ("region", "script") and ".." not in entry["Subtag"]
    ]
    names = {name.casefold(): entry["Subtag"] for entry in entries for name in entry["Description"]}
    return {entry["Subtag"].casefold(): entry["Subtag"] for entry in entries} | names | _COUNTRIES


@lru_cache(maxsize=1)
def _names() -> dict[str, str]:
    """Names, casefolded -> code; a registry name that several languages have is none."""
    of_name: dict[str, set[str]] = defaultdict(set)
    for entry in parse_registry():
        if entry.get("Type") == "language" and ".." not in entry["Subtag"] and "Preferred-Value" not in entry:
            if entry.get("Scope") in ("special", "collection", "private-use"):
                continue
            for name in entry["Description"]:
                of_name[_NOTE.sub("", name).casefold()].add(entry["Subtag"])
    names = {}
    for name, codes in of_name.items():
        short = {code for code in codes if len(code) == 2}
        if len(codes) == 1 or len(short) == 1:
            names[name] = min(short or codes)
    return names | json.loads(read_data("languages/names.json"))


def in_order(languages: Sequence[str], found: Sequence[str]) -> list[str]:
    """`found` without repeats: languages of the run in the config's order, then others by name."""
    known = [language for language in languages if language in set(found)]
    return known + sorted(set(found) - set(known))
