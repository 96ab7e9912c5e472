"""Which script a text is written in: looked up character by character, simplified and traditional Chinese told apart."""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache

_LONGEST = 2000
_NAMES = {
    "LATIN": "Latn", "CYRILLIC": "Cyrl", "ARABIC": "Arab", "GREEK": "Grek", "HEBREW": "Hebr", "ARMENIAN": "Armn",
    "GEORGIAN": "Geor", "DEVANAGARI": "Deva", "BENGALI": "Beng", "GURMUKHI": "Guru", "GUJARATI": "Gujr", "ORIYA": "Orya",
    "TAMIL": "Taml", "TELUGU": "Telu", "KANNADA": "Knda", "MALAYALAM": "Mlym", "SINHALA": "Sinh", "THAI": "Thai",
    "LAO": "Laoo", "TIBETAN": "Tibt", "MYANMAR": "Mymr", "KHMER": "Khmr", "ETHIOPIC": "Ethi", "HANGUL": "Kore",
    "HIRAGANA": "Jpan", "KATAKANA": "Jpan", "CJK": "Hani", "BOPOMOFO": "Hant", "MONGOLIAN": "Mong", "TIFINAGH": "Tfng",
    "CHEROKEE": "Cher", "CANADIAN": "Cans", "THAANA": "Thaa", "NKO": "Nkoo", "SYRIAC": "Syrc", "JAVANESE": "Java",
    "BALINESE": "Bali", "OL": "Olck", "MEETEI": "Mtei", "YI": "Yiii", "VAI": "Vaii", "ADLAM": "Adlm", "SUNDANESE": "Sund",
}  # fmt: skip
_HAN = ("Hani", "Hans", "Hant", "Jpan", "Kore")


def script_in(text: str) -> str | None:
    """The ISO 15924 code of the script that most letters of the text are in; None without letters.

    Chinese characters: Hans or Hant by those that only GB 2312 or only Big5 has; Hani where neither outweighs the other;
    Jpan if there are kana, Kore if most letters are Hangul.
    """
    counts = Counter(script for char in text[:_LONGEST] if (script := _script(char)) is not None)
    if not counts:
        return None
    if counts["Jpan"] and counts["Jpan"] + counts["Hani"] > sum(counts.values()) / 2:
        return "Jpan"
    most = min(counts, key=lambda script: (-counts[script], script))
    return _chinese(text[:_LONGEST]) if most == "Hani" else most


def fits(script: str, wanted: str) -> bool:
    """Whether a text in `script` can be one in the script `wanted`: the same, or Chinese characters that are in both."""
    return script == wanted or ("Hani" in (script, wanted) and script in _HAN and wanted in _HAN)


def _chinese(text: str) -> str:
    simplified = sum(_only_in(char, "gb2312", "big5") for char in text)
    traditional = sum(_only_in(char, "big5", "gb2312") for char in text)
    return "Hans" if simplified > traditional else "Hant" if traditional > simplified else "Hani"


@lru_cache(maxsize=32768)
def _only_in(char: str, encoding: str, other: str) -> bool:
    return "\u4e00" <= char <= "\u9fff" and encodes(char, encoding) and not encodes(char, other)


def encodes(text: str, encoding: str) -> bool:
    """Whether an encoding has all characters of a text."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def may_be_japanese(text: str) -> bool:
    """Whether modern Japanese has every Chinese character of a text: those of the first level of JIS X 0208, and of the second those that no
    one has simplified (檬 and 漱; not 寫, 譯 and 氣, which Japanese writes 写, 訳 and 気)."""
    return all(_is_kanji(char) for char in text if "\u4e00" <= char <= "\u9fff")


def _is_kanji(char: str) -> bool:
    common = b"\xb0" <= char.encode("euc_jp", "replace")[:1] <= b"\xcf"
    return common or (encodes(char, "cp932") and encodes(char, "gb2312"))


@lru_cache(maxsize=32768)
def _script(char: str) -> str | None:
    if not char.isalpha():
        return None
    return _NAMES.get(unicodedata.name(char, "").split(" ")[0].split("-")[0])
