"""Fences around judged texts: data that cannot close its own fence and so cannot speak to the judge as the rubric does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from schemas.ids import content_id

_LOOK_ALIKE = re.compile(r"[<＜]\s*[/／]?\s*(?:task|answer)\s*-", re.IGNORECASE)


def fenced(kind: str, text: str, *key: str) -> str:
    """`text` between <kind-TAG> and </kind-TAG>; kind is task or answer.

    TAG is a hash of the text and `key`: nobody can write a text that holds its own tag, and equal texts get equal
    fences, so that an engine's prefix cache serves every answer to one task. Anything in the text that looks like a
    fence, with whatever tag, gets a space after its first character.
    """
    tag = f"{kind}-{content_id('fence', kind, text, *key)[:10]}"
    inside = _LOOK_ALIKE.sub(lambda match: f"{match.group()[0]} {match.group()[1:].lstrip()}", text)
    inside = inside.replace(tag, tag.replace("-", "- "))
    return f"<{tag}>\n{inside}\n</{tag}>"


def task_text(messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation as one text: a lone user turn as it is, otherwise every turn after its role."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)
