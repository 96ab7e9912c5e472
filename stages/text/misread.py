"""Texts whose UTF-8 was read in another encoding: “don’t” as “donâ€™t”, “Привет” as “РџСЂРёРІРµС‚”, lost characters as “ï¿½”.

ftfy's measure of what does not meet in words finds them: in Windows', Mac's and DOS's Western, Central European and Cyrillic
encodings. Of lost characters Windows' Chinese one is known too.
"""

from __future__ import annotations

import re

from ftfy.badness import BADNESS_RE

_PAGES = ("cp1250", "cp1251", "cp1252", "cp1253", "cp1254", "cp1256", "mac_roman", "cp437", "cp850", "cp866", "koi8_r")
_FFFD = {read for page in _PAGES if len(read := "\ufffd".encode().decode(page, "ignore")) == 3}
_LOST = re.compile("|".join(map(re.escape, sorted({*_FFFD, "\ufffd\ufffd".encode().decode("gbk")}))))

_WRITTEN = frozenset(("Å²", "Å³", "√±"))
"""What people write, too: square and cubic ångströms, roots."""


def has_lost(text: str) -> bool:
    """Whether U+FFFD, which stands for lost characters, is in a text, as itself or read in another encoding."""
    return "\ufffd" in text or (not text.isascii() and _LOST.search(text) is not None)


def misread(text: str) -> re.Match[str] | None:
    """Where a text was read in another encoding than its own; U+FFFD itself does not tell (`has_lost`)."""
    if text.isascii():
        return None
    found = BADNESS_RE.finditer(text)
    return _LOST.search(text) or next((one for one in found if one[0] not in _WRITTEN and "\ufffd" not in one[0]), None)
