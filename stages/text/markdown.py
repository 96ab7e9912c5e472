"""Names and figures in Markdown files that others render: model cards and dataset cards."""

from __future__ import annotations

import re

from stages.text.visible import visible

_SPECIAL = re.compile(r"([\\`*_{}\[\]()<>#+\-.!|~$&@:=^/])")


def escape(text: str) -> str:
    """`text` as inert Markdown on one line: no markup, no HTML, no link, no table cell, nothing invisible."""
    return _SPECIAL.sub(r"\\\1", " ".join(visible(text).split()))
