"""Language codes as data sets and configs write them: BCP 47, FLORES ("swh_Latn"), ISO 639-3, locales, names.

Macrolanguages and English names are those of the IANA registry, which follows ISO 639-3 and is part of langcodes.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from difflib import get_close_matches
from functools import lru_cache
from unicodedata import category, normalize

import langcodes
from langcodes.registry_parser import parse_registry

from schemas.paths import DATA

UNKNOWN = "und"
_NO_LANGUAGE = frozenset((UNKNOWN, "mul", "mis", "zxx"))
_UNSAID = frozenset((
    UNKNOWN, "unknown", "unk", "undetermined", "unidentified", "nolang", "multilingual", "multi", "mixed", "other", "others", "various", "n/a", "-", "?",
))  # fmt: skip
"""What data sets write where the language is not known, or one of many."""
_ALSO_CODE = frozenset((
    *("cpp", "css", "xml", "tex", "ada", "nim", "tsx", "lua", "tcl", "awk", "asm", "elm", "nix", "coq", "sas", "yml", "bat"),
    *("code", "plaintext", "assembly", "shell script", "jupyter notebook", "pl/sql"),
))  # fmt: skip
"""Programming languages by names that Pygments lacks, or that are codes of languages of which there is hardly any data."""
_NOTE = re.compile(
    r"\s*\((?:macrolanguage|individual(?: language)?|[0-9c. -]+)\)|^(?:Modern|Standard) (?=Greek|Hebrew)", re.IGNORECASE
)
_LOCALE = re.compile(r"\A([A-Za-z]{2,3}(?:_[A-Z][a-z]{3})?(?:_[A-Z]{2})?)(?:\.[\w-]{1,20})?(?:@euro)?\Z")
"""Locales as POSIX names them: "de_AT.UTF-8"."""
_LIST_OF_ONE = re.compile(r"""\A\[\s*(["'])([^"'\[\]]+)\1\s*\]\Z""")
_ANY_HAN = "Hani"
_LONGEST = 60  # characters
_COUNTRIES = {
    **{
        "usa": "US",
        "uk": "GB",
        "great britain": "GB",
        "brasil": "BR",
        "south korea": "KR",
        "taiwan": "TW",
        "iran": "IR",
    },
    **{"russia": "RU", "vietnam": "VN", "latin america": "419", "simplified": "Hans", "traditional": "Hant"},
    **{"简体": "Hans", "簡體": "Hans", "繁体": "Hant", "繁體": "Hant"},
}
_QUALIFIED = re.compile(r"(?P<base>[^(),]+?)(?: ?\((?P<inside>[^()]+)\)|(?:, | [-–—] )(?P<after>[^(),]+))")
_SPOKEN_IN = {"kz": "kk"}
"""Countries whose own language is not the one that most people there write."""


@lru_cache(maxsize=4096)
def standard(code: str) -> str | None:
    """The code as BCP 47 writes it ("zh-Hant" of "zho_hant"), the code of a language's name, or None.

    A name counts in English or in the language itself. Hani, Chinese characters of either kind, is no script of its own. Characters
    without a look of their own, other forms of a letter and the brackets of a list of one do not count.
    """
    if len(code) > _LONGEST:
        return None
    code = _plain(code)
    if (only := _LIST_OF_ONE.match(code)) is not None:
        code = only.group(2).strip()
    code = _LOCALE.sub(r"\1", code)
    if not langcodes.tag_is_valid(code):
        return named(code)
    found = langcodes.Language.get(langcodes.standardize_tag(code))
    if not found.is_valid():
        return named(code)
    return found.update_dict({"script": None}).to_tag() if found.script == _ANY_HAN else found.to_tag()


def named(name: str) -> str | None:
    """The code of the language of this name ("German", "Deutsch", "Spanish (Mexico)", "Serbian (Latin)"), or None.

    As ISO 639 writes them, too: "Greek, Modern (1453-)", and "Spanish; Castilian", two names of one language. What follows a name in
    parentheses, after a comma or a dash is a country, a script, or another name: "Portuguese - Brazil", "Persian (Farsi)".
    """
    if len(name) > _LONGEST:
        return None
    if len(parts := re.split("[;/]", _plain(name))) > 1:
        codes = {named(part) for part in parts}
        return codes.pop() if len(codes) == 1 else None
    words = _NOTE.sub("", " ".join(parts[0].casefold().replace("_", " ").split()))
    found = (
        _names().get(words)
        or _turned(words)
        or _qualified(words)
        or _beside(words)
        or _unaccented_names().get(_unaccented(words))
    )
    return langcodes.standardize_tag(found) if found else None


def _turned(words: str) -> str | None:
    """Of "chinese, mandarin"."""
    name, _, before = words.partition(", ")
    return _names().get(_NOTE.sub("", f"{before} {name}")) if before else None


def _qualified(words: str) -> str | None:
    """Of "spanish (mexico)"."""
    if (found := _QUALIFIED.fullmatch(words)) is None:
        return None
    name, part = found["base"], found["inside"] or found["after"]
    code = len(name) <= 3 and langcodes.tag_is_valid(name)
    if code and not found["inside"]:  # "en, de": several languages
        return None
    base, more, other = name if code else _names().get(name), _parts().get(part), _names().get(part)
    if base is None:
        return None
    if part == base and langcodes.Language.get(f"und-{part}").maximize().language != base:
        return base  # "Swedish (sv)", where SV is El Salvador
    if more is not None:
        return f"{base}-{more}"
    if (whole := _names().get(_NOTE.sub("", f"{part} {name}"))) is not None:
        return whole
    return other if other and base in (other, macrolanguage(other)) else None


def _beside(words: str) -> str | None:
    """Of "serbian latin", "chinese-simplified" and "us english": a script or a country beside the name."""
    parts = words.replace("-", " ").split()
    for name, part in ((parts[:-1], parts[-1:]), (parts[1:], parts[:1])):
        base, more = _names().get(" ".join(name)), _parts().get(" ".join(part))
        if base is not None and more is not None:
            return f"{base}-{more}"
    return None


def says_none(label: str) -> bool:
    """Whether a label of a row's language says nothing of the language that is spoken: that it is not known, or a programming language, which
    sets of code write there."""
    word = label.strip().casefold()
    return word in _UNSAID or word in _code_languages()


@lru_cache(maxsize=1)
def _code_languages() -> frozenset[str]:
    """Names of programming languages as Pygments knows them, casefolded, that are no language's code or name."""
    from pygments.lexers import get_all_lexers

    names = {alias.casefold() for name, aliases, _, _ in get_all_lexers() for alias in (name, *aliases)}
    return frozenset(name for name in names if standard(name) is None) | _ALSO_CODE


def country_of(code: str) -> str | None:
    """The code of the language that is most spoken in the country of this code, where that is another language's or none: "ja" of "jp",
    "ko" of "kr" (Kanuri); None for other codes."""
    code = code.casefold()
    if len(code) != 2 or _parts().get(code) != code.upper():
        return None
    there = langcodes.Language.get(f"und-{code}").maximize()
    likely = _SPOKEN_IN.get(code, there.language or UNKNOWN)
    if likely in (UNKNOWN, base_language(code)):
        return None
    usual = langcodes.Language.get(likely).maximize().script
    return likely if likely != there.language or there.script == usual else f"{likely}-{there.script}"


@lru_cache(maxsize=1024)
def told_from_country(code: str) -> str:
    """What to say of a code that a country has too: "kr is Kanuri; Korean is ko"; empty if there is nothing to say."""
    meant = country_of(code)
    if meant is None:
        return ""
    own = english_name(code)
    return f"{code} is {own}; {english_name(meant)} is {meant}" if own else f"{english_name(meant)} is {meant}"


def english_name(code: str) -> str | None:
    """The registry's name of a code's language: "Korean" of "ko"."""
    return _english().get(base_language(code)) if langcodes.tag_is_valid(code) else None


def likely_code(word: str) -> str | None:
    """What somebody who wrote `word` for a language may have meant, as code: "en" of "English" and "englich", "ja" of "jp"."""
    found = standard(word) or country_of(word)
    if found is None and len(word) <= _LONGEST:
        nearest = get_close_matches(_plain(word).casefold(), _names(), n=1, cutoff=0.8)
        found = _names()[nearest[0]] if nearest else None
    return found


def no_code(code: str, names_too: bool = False) -> str | None:
    """Why `code` cannot stand for a language in a config, with what may be meant; None if it can. names_too: a name is as good as a code."""
    valid = langcodes.tag_is_valid(code) and langcodes.Language.get(code).is_valid()
    if (valid or names_too) and (known := standard(code)) is not None:
        if base_language(known) not in _NO_LANGUAGE and not known.startswith("x-"):
            return None
        return f"{code!r} is no one language's code (for example en, de, zh)"
    what = f"{code[:40]!r} is not a BCP 47 language code (for example en, de, zh)"
    if names_too:
        what += " and no language's name"
    meant = likely_code(code)
    return what if meant is None else f"{what}; did you mean {meant} ({english_name(meant)})?"


@lru_cache(maxsize=4096)
def base_language(code: str) -> str:
    """The primary language subtag: "zh" of "zh-Hans", "he" of "iw"."""
    return langcodes.Language.get(code).language or UNKNOWN


@lru_cache(maxsize=4096)
def macrolanguage(code: str) -> str:
    """The base language's macrolanguage ("ar" of "arz", "zh" of "yue"), or the base language itself.

    Some codes are only aliases of another: tl is fil in CLDR, and both count as fil.
    """
    base = base_language(code)
    alias = langcodes.standardize_tag(base) if base != UNKNOWN else base
    return _macrolanguages().get(alias, alias)


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
    over: set[str] = set()
    for entry in parse_registry():
        if entry.get("Type") == "language" and ".." not in entry["Subtag"] and "Preferred-Value" not in entry:
            if entry.get("Scope") in ("special", "collection", "private-use"):
                continue
            if entry.get("Scope") == "macrolanguage":
                over.add(entry["Subtag"])
            for name in entry["Description"]:
                of_name[_NOTE.sub("", name).casefold()].add(entry["Subtag"])
    names = {}
    for name, codes in of_name.items():
        short = {code for code in codes if len(code) == 2} or codes & over
        if len(codes) == 1 or len(short) == 1:
            names[name] = min(short or codes)
    listed = json.loads((DATA / "languages" / "names.json").read_text(encoding="utf-8"))
    return {_plain(name): code for name, code in (names | listed).items()}


@lru_cache(maxsize=1)
def _english() -> dict[str, str]:
    """Code -> the registry's first name, less what tells it from others of the name."""
    return {
        entry["Subtag"]: _NOTE.sub("", entry["Description"][0])
        for entry in parse_registry()
        if entry.get("Type") == "language"
    }


@lru_cache(maxsize=1)
def _unaccented_names() -> dict[str, str]:
    """Names without the marks on their letters, of one language each -> code: "bokmal"."""
    of_name: dict[str, set[str]] = defaultdict(set)
    for name, code in _names().items():
        of_name[_unaccented(name)].add(code)
    return {name: codes.pop() for name, codes in of_name.items() if len(codes) == 1}


def _unaccented(text: str) -> str:
    """Latin letters without their marks."""
    return re.sub("(?<=[a-z])[\u0300-\u036f]+", "", normalize("NFD", text))


def _plain(text: str) -> str:
    """Compatible and composed forms of letters (NFKC), without characters that cannot be seen (Cf), stripped."""
    if text.isascii():
        return text.strip()
    return "".join(letter for letter in normalize("NFKC", text) if category(letter) != "Cf").strip()
