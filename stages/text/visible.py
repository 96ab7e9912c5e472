"""Text made harmless to look at, for terminals, logs, pages and cards alike.

Everything a model or a data set wrote is hostile until shown through `visible`: it could steer a terminal, reorder the
text around it, hide, or not be writable at all (lone surrogates). Escaping for HTML or Markdown comes on top.
"""

from __future__ import annotations

import unicodedata

_JOINERS = "\u200c\u200d"
_KEEP = "\n\t"
_HIDDEN = ("Cc", "Cf", "Cn", "Cs", "Zl", "Zp")


def visible(text: str) -> str:
    """`text` with control, zero-width, bidi-control and unassigned characters shown as [U+XXXX].

    Line feeds and tabs stay. Zero-width joiners and non-joiners stay where a script or an emoji needs them (between
    two non-ASCII letters, marks or symbols): Hindi and Persian are misspelt without. Line and paragraph separators
    also break the line. The result can be encoded as UTF-8.
    """
    if text.isascii() and text.isprintable():
        return text
    text = text.replace("\r\n", "\n")
    return "".join(_shown(text, i) for i in range(len(text)))


def without_hidden(text: str) -> str:
    """`text` less what `visible` would spell out: what a reader of the page sees."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(char for i, char in enumerate(text) if not _hidden(text, i))


def _shown(text: str, i: int) -> str:
    char = text[i]
    return f"[U+{ord(char):04X}]" + ("\n" if char in "\u2028\u2029" else "") if _hidden(text, i) else char


def _hidden(text: str, i: int) -> bool:
    char = text[i]
    if char in _KEEP or (char.isascii() and char.isprintable()):
        return False
    if char in _JOINERS and 0 < i < len(text) - 1 and _shaped(text[i - 1]) and _shaped(text[i + 1]):
        return False
    return unicodedata.category(char) in _HIDDEN


def _shaped(char: str) -> bool:
    return not char.isascii() and unicodedata.category(char)[0] in "LMS"
