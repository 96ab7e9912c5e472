"""Names and figures in Markdown files that others render: model cards and dataset cards."""

from __future__ import annotations

import re

from stages.text.visible import visible

_SPECIAL = re.compile(
    r"[\\`*\[\]<>|~$&@{}]"  # anywhere
    r"|(?<![^\W_])_|_(?![^\W_])"  # emphasis, but not an underscore inside a word
    r"|^(?:#{1,6}|[+\-]|\d{1,9}[.)])(?=\s|$)|^=+$|--+"  # a heading, a list, a rule
    r"|:(?=//)|(?<=\bwww)\.",  # links without markup
    re.IGNORECASE,
)


def escape(text: str) -> str:
    """`text` as inert Markdown on one line: no markup, no HTML, no link, no table cell, nothing invisible.

    Ordinary names and numbers stay as they are; what would be markup is written as HTML character references, which every
    renderer shows as the character, and never with backslashes, which those who read the file would see.
    """
    line = " ".join(visible(text).split())
    return _SPECIAL.sub(lambda found: re.sub(r"\W|_", lambda c: f"&#{ord(c[0])};", found[0]), line)
