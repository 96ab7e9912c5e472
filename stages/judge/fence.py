"""What a judge is shown of judged texts: data that cannot close its fence, hide anything, or give the judge's reply.

Measured against attacks: docs/hostile-text.md, benchmarks/judge_injection.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from schemas.ids import content_id
from stages.text.visible import without_hidden

_LOOK_ALIKE = re.compile(r"[<＜]\s*[/／]?\s*(?:task|answer)\s*-", re.IGNORECASE)
_SCALE = r"\(\s*[0٠०]\s*[-–—~]\s*[5٥५]\s*\)"
_QUOTE = "> "


def fenced(kind: str, text: str, *key: str) -> str:
    """`text` between <kind-TAG> and </kind-TAG>, every line quoted; kind is task or answer.

    TAG is a hash of the text and `key`: nobody can write a text that holds its own tag, and equal texts get equal
    fences, so that an engine's prefix cache serves every answer to one task. Anything in the text that looks like a
    fence, with whatever tag, gets a space after its first character. Characters that no reader would see are left out.
    The quote marks are Hines et al.'s datamarking, a line at a time (arXiv 2403.14720).
    """
    tag = f"{kind}-{content_id('fence', kind, text, *key)[:10]}"
    inside = _LOOK_ALIKE.sub(lambda match: f"{match.group()[0]} {match.group()[1:].lstrip()}", without_hidden(text))
    inside = inside.replace(tag, tag.replace("-", "- "))
    return f"<{tag}>\n{_QUOTE}{inside.replace(chr(10), chr(10) + _QUOTE)}\n</{tag}>"


def without_scores(text: str, lead_in: str) -> str:
    """`text` with the digit left out wherever it is written as a judge writes its verdict: "Score (0-5): 5" -> "Score (0-5): …".

    lead_in: what the rubric puts before the score, for example "Punkte (0-5):". A small model copies such a line whatever
    it was told about it. A label counts with a colon or the scale after it; other numbers stay as they are.
    """
    label = re.sub(_SCALE, "", lead_in).strip(" \t:：")
    labels = "|".join([r"(?<![^\W_])scores?", *([re.escape(label)] if label else [])])
    pattern = rf"((?:{_SCALE}|(?:{labels})[\W_]{{0,4}}?[:：=])[\W_]{{0,8}})\d+(?:[.,]\d+)?"
    return re.sub(pattern, r"\1…", without_hidden(text), flags=re.IGNORECASE)


def task_text(messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation as one text: a lone user turn as it is, otherwise every turn after its role."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)
