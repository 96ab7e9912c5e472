"""Cells as they come out of files, made plain before anything looks at them: one place for what is missing, for numbers
that were made floats, for bytes that are text, and for ratings written as people write them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

MISSING_WORDS = frozenset(
    (
        *("nan", "NaN", "NaT", "<NA>", "NA", "N/A", "n/a", "#N/A", "\\N", "-", "undefined"),
        *("none", "None", "NONE", "null", "Null", "NULL"),
    )
)
"""What a cell that names something holds where it names nothing; `na` is a language's code (Nauru's)."""
_LONGEST_ID = 64  # bytes
_WHOLE = re.compile(r"([+-]?\d{1,30})\.0+")
_RATING = re.compile(
    r"([+\u2212-]?(?:\d{1,15}(?:[.,]\d{0,15})?|[.,]\d{1,15})(?:[eE][+-]?\d{1,3})?)\s*(?:(?:/|⁄|out of|of)\s*(\d{1,9}(?:[.,]\d{1,9})?)|(%))?"
)
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")


@dataclass(frozen=True)
class Unreadable:
    """A cell that holds nothing usable: the reason code and the figures that its row is dropped with.

    name: what its bytes are as a name, in hexadecimal, if they are few (a digest, a UUID)."""

    reason: str
    detail: str
    name: str | None = None


def plain(value: Any) -> Any:
    """`value` with NaN and "" as None and UTF-8 bytes as text, inside lists and dicts too; Unreadable for other bytes."""
    if isinstance(value, str):
        return value or None
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, (bytes, bytearray)):
        try:
            return value.decode("utf-8") or None
        except UnicodeDecodeError:
            name = value.hex() if len(value) <= _LONGEST_ID else None
            return Unreadable("not_text", f"{len(value)} bytes that are not UTF-8", name)
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value


def cell_id(value: Any) -> str | None:
    """What a row is called by: equal for 1, 1.0, "1" and "1.0"; None where nothing is written, or only what writes nothing (nan, null)."""
    if value is None or isinstance(value, Unreadable):
        return value.name if value else None
    if isinstance(value, (float, Decimal)):
        if not math.isfinite(value):
            return None
        if value == int(value):
            return _digits(int(value))
    if isinstance(value, int) and not isinstance(value, bool):
        return _digits(value)
    text = str(value).strip()
    if not text or text in MISSING_WORDS:
        return None
    whole = _WHOLE.fullmatch(text)
    return whole.group(1) if whole else text


def word(value: Any) -> str | None:
    """A short text that names something (a language, a split): stripped; None where nothing is written."""
    if value is None or isinstance(value, Unreadable):
        return None
    text = cell_id(value)
    return text.strip() if text else None


@dataclass(frozen=True)
class Rating:
    """A number, and what it is out of (10 in "7/10", 100 in "85%"), if that is written."""

    value: float
    out_of: float | None = None


@dataclass(frozen=True)
class Unsure:
    """A number such as "4,125", whose comma begins decimals or groups thousands. decimal: it as the first; number: as it is written."""

    number: str
    decimal: Rating


def ratings(values: Sequence[Any]) -> list[Rating | Unsure | None]:
    """The rating that each cell holds: 7, "7", "7.5", "1,5", "7/10", "7 out of 10", "85%"; None for anything else.

    The cells are compared with each other: "4,125" is a number with decimals where another of them shows that a comma begins these ("0,900", "3,5").
    """
    found = [_rating(value) for value in values]
    shown = any(
        isinstance(r, Rating) and isinstance(value, str) and "," in value
        for r, value in zip(found, values, strict=True)
    )
    return [r.decimal if shown and isinstance(r, Unsure) else r for r in found]


def _rating(value: Any) -> Rating | Unsure | None:
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, (int, float, Decimal)):
        try:
            number = float(value)
        except OverflowError:
            return None
        return Rating(number) if math.isfinite(number) else None
    if not isinstance(value, str) or len(value) > 60 or (found := _RATING.fullmatch(value.strip())) is None:
        return None
    number = float(found.group(1).replace(",", ".").replace("\u2212", "-"))
    if not math.isfinite(number):
        return None
    scale = 100.0 if found.group(3) else float(found.group(2).replace(",", ".")) if found.group(2) else None
    read = Rating(number, scale)
    return Unsure(found.group(1), read) if _THOUSANDS.fullmatch(found.group(1)) else read


def _digits(value: int) -> str:
    """The decimal digits; hexadecimal beyond what Python writes in decimal (4,300 digits)."""
    return str(value) if value.bit_length() < 10_000 else hex(value)
