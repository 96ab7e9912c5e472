"""Which columns are looked for in a file, and what is refused of any file of text."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from schemas.errors import UserError

BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")


def without_boms(data: bytes) -> bytes:
    """A text without the byte order marks that it begins with: files that have one may be joined, or get another."""
    while data.startswith(BOM):
        data = data[len(BOM) :]
    return data


def invisible(text: str, at: int) -> str:
    """The name of a character that nobody sees, as a NUL byte or a zero-width space; empty for any other, and for spaces that are usual."""
    one = text[at : at + 1]
    if not one or one in " \t\r\n" or unicodedata.category(one) not in ("Cc", "Cf", "Zs", "Zl", "Zp"):
        return ""
    return f"U+{ord(one):04X} ({'a NUL byte' if one == chr(0) else unicodedata.name(one, 'a control character')})"


@dataclass(frozen=True)
class WantedColumns:
    """What is looked for in a file: columns it must have, columns it may have, and a CSV file's delimiter (None: found out).

    structured: columns whose texts are lists -> the key of the text in them. lists, singles: those whose texts may be lists (`stages.layout.Layout`).
    present: all the columns of a file whose rows come with the wanted ones only, once it is opened.
    """

    required: Sequence[str]
    optional: Sequence[str] = ()
    delimiter: str | None = None
    structured: Mapping[str, str | None] = field(default_factory=dict)
    lists: Mapping[str, str] = field(default_factory=dict)
    singles: Sequence[str] = ()
    present: list[str] = field(default_factory=list)

    def of(self, present: Sequence[str]) -> list[str] | None:
        """The columns to read of those that are `present`; None: all, because a required one is missing and the message lists them."""
        self.present[:] = present
        found = [name for name in dict.fromkeys([*self.required, *self.optional]) if name in present]
        return found if found and set(self.required) <= set(present) else None


def respelt(present: Iterable[str], wanted: Sequence[str]) -> dict[str, str]:
    """Columns of a wanted name in other code points (é as one, or as e and its accent) -> the wanted name."""
    missing = [name for name in wanted if not name.isascii()]
    if not missing:
        return {}
    names = dict.fromkeys(present)
    composed = {unicodedata.normalize("NFC", name): name for name in names}
    return {
        composed[n]: name
        for name in missing
        if name not in names and (n := unicodedata.normalize("NFC", name)) in composed
    }


def refuse_twice(where: str, names: Sequence[str]) -> None:
    """Raise UserError for a column name that is there more than once: nobody could say which is meant."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(
            f"the column {twice[0][:80]!r} is there {Counter(names)[twice[0]]} times",
            where=where,
            fix="Rename or remove all but one of them.",
        )


def not_utf8(where: str, head: bytes, what: str) -> UserError:
    """The error of a text in another encoding. head: how the file begins; what: what cannot be decoded."""
    fix = "It looks like UTF-16: save it as UTF-8." if head.startswith(UTF16) else "Save the file as UTF-8."
    return UserError(f"the text is not UTF-8: {what} cannot be decoded", where=where, fix=fix)
