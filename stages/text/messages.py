"""Conversations out of untrusted data: one clean list of text messages, or the reason why there is none."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from stages.cells import MISSING_WORDS, Unreadable

Messages = list[dict[str, str]]

_BREAK = re.compile(r"\r\n|[\r\x0b\x0c\x1c-\x1f\x85]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
_FOREIGN = re.compile(r"[\x80-\x84\x86-\x9f]")
"""What is left of letters and quotes where a text was decoded in another encoding than its own."""
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_WHOLE = 1e15
"""Beyond it a float is a measure, not a number that was whole."""
_UNSEEN = (
    "\u00ad\u034f\u115f\u1160\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\u2800\u3164\ufeff\uffa0"
)
_BLANK = re.compile(rf"[\s\u200c\u200d{_UNSEEN}]*")
_INVISIBLE = re.compile(rf"[{_UNSEEN}]|[\u200c\u200d](?![^\x00-\x7f])|(?<![^\x00-\x7f])[\u200c\u200d]")
"""What nobody sees; joiners between letters, marks or symbols that are not ASCII change how these are written."""
_BEGINNING = 100
"""Characters in which two answers mostly differ already."""
_INDENT = frozenset(" \t\u3000")
"""Of code and Markdown, and of paragraphs in Chinese and Japanese."""
_MISSING = ("nan", "NaN", "<NA>", "NaT")
"""How pandas writes that there is nothing; None and null may be answers."""
_SPACE = re.compile(r"\s+")


class BadRow(Exception):
    """A row that cannot be used: a reason code and the figures behind it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, storable(detail)


def unspoken(message: Mapping[Any, Any]) -> BadRow:
    """What a message without a role is dropped as."""
    keys = ", ".join(map(str, message))[:80]
    return BadRow("unknown_role", f"a message with the keys {keys} does not say who speaks (role and content)")


def clean(text: str) -> str:
    """NFC, newlines and what else parts lines or pages as \\n, no other control characters but tab, no byte order mark, lone surrogates
    as U+FFFD, no outer space (`unpadded`)."""
    text = _CONTROL.sub("", _BREAK.sub("\n", text))
    return unpadded(unicodedata.normalize("NFC", storable(text)))


def unpadded(text: str) -> str:
    """The text without white space around it; what indents the first of several lines (a tab, two spaces and more, an ideographic
    one) stays: code and Markdown mean something else without."""
    text = text.rstrip()
    bare = text.lstrip()
    if len(bare) == len(text) or "\n" not in bare:
        return bare
    before = text[: len(text) - len(bare)]
    indent = before[before.rfind("\n") + 1 :]
    return (
        f"{indent}{bare}" if set(indent) <= _INDENT and any(mark in indent for mark in ("\t", "  ", "\u3000")) else bare
    )


def storable(text: str) -> str:
    """Lone surrogates, which JSON can carry and UTF-8 cannot, as U+FFFD."""
    return _SURROGATE.sub("\ufffd", text)


def comparable(text: str) -> str:
    """What two texts are compared by: NFC, casefolded, runs of white space as one space."""
    return _SPACE.sub(" ", unicodedata.normalize("NFC", text.casefold())).strip()


def is_blank(text: str) -> bool:
    """Whether a reader sees nothing of a text."""
    return _BLANK.fullmatch(text) is not None


def same_text(one: str, other: str) -> bool:
    """Whether two texts are one to a reader: composed alike (NFC), and what nobody sees left out. Case and white space count."""
    if one == other or (one.isascii() and other.isascii()):
        return one == other
    begun = [_visible(text[:_BEGINNING]).lstrip() for text in (one, other)]
    told = min(map(len, begun)) - 2  # what follows a beginning may change how its last characters are written
    return (told <= 0 or begun[0][:told] == begun[1][:told]) and _visible(one) == _visible(other)


def _visible(text: str) -> str:
    return unpadded(unicodedata.normalize("NFC", _INVISIBLE.sub("", text)))


def read_messages(value: Any, role: str = "user") -> Messages:
    """Clean messages from a text (one message of `role`) or a list of {role, content}.

    Empty system messages at the beginning are left out. Other forms of conversations are made lists before
    (`stages.text.forms`). Raises BadRow: empty (a message is), not_text (something else, or multimodal content), tool_calls,
    unknown_role, and what an Unreadable says.
    """
    if isinstance(value, Unreadable):
        raise BadRow(value.reason, value.detail)
    value = _written(value)
    if value is None:
        raise BadRow("empty")
    if isinstance(value, str):
        if value.strip() in _MISSING:
            raise BadRow("empty", f"{value.strip()!r} is how a missing value is written")
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise BadRow("not_text", f"{kind_of(value)} instead of a text or a list of messages (role and content)")
    messages = [_message(message) for message in value]
    begun = next((n for n, message in enumerate(messages) if message["role"] != "system"), len(messages))
    for number, message in enumerate(messages[begun:], start=begun + 1):
        if is_blank(message["content"]):
            which = f"message {number} of {len(messages)}, the {message['role']}'s, is empty"
            raise BadRow("empty", which if len(messages) > 1 else "")
    said = [message for message in messages[:begun] if not is_blank(message["content"])] + messages[begun:]
    if not said:
        raise BadRow("empty")
    return said


def read_prompt(value: Any, system: Any = None) -> Messages:
    """Clean messages that end in a user turn. Raises BadRow as `read_messages` does, and no_user_turn."""
    messages = read_messages(value)
    if messages[-1]["role"] != "user":
        raise BadRow("no_user_turn", f"the last message is the {messages[-1]['role']}'s")
    return with_system(messages, system)


def with_system(messages: Messages, system: Any) -> Messages:
    """The messages after a system message, unless they bring their own or `system` says nothing. Raises BadRow: not_text."""
    if system is None or messages[0]["role"] == "system":
        return messages
    if isinstance(system, list) and len(system) == 1 and isinstance(system[0], dict):
        system = system[0].get("content", system[0].get("text"))
    if not isinstance(system, str):
        raise BadRow("not_text", f"the system message is a {type(system).__name__}")
    content = _readable(system)
    return [{"role": "system", "content": content}, *messages] if content not in ("", *MISSING_WORDS) else messages


def too_long(value: Any, limit: int) -> int:
    """How many characters the texts in a cell have, if that is more than `limit`; 0 otherwise. Looks at no character."""
    total = _characters(value)
    return total if total > limit else 0


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0


def spoken(messages: Messages) -> str:
    """The conversation's text without system messages, which many rows may share."""
    return "\n".join(message["content"] for message in messages if message["role"] != "system")


def _written(value: Any) -> Any:
    """A number as a text: the answer 7 is one in JSON, pandas makes 7.0 of it, and a decimal column 7.00."""
    if isinstance(value, Decimal) and value.is_finite():
        return f"{value.to_integral_value() if value == value.to_integral_value() else value.normalize():f}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return value
    whole = isinstance(value, float) and value.is_integer() and abs(value) < _WHOLE
    return str(int(value)) if whole else str(value)


def kind_of(value: Any) -> str:
    """What a cell holds that is no text, for people."""
    if isinstance(value, dict):
        return f"an object with the keys {', '.join(map(str, value))[:80]}"
    if isinstance(value, list):
        return f"a list of {', '.join(sorted({type(one).__name__ for one in value}))[:80]}"
    return f"a value of type {type(value).__name__}"


def _message(message: dict[Any, Any]) -> dict[str, str]:
    role, content = message.get("role"), message.get("content")
    if message.get("tool_calls") or role in ("tool", "function"):
        raise BadRow("tool_calls")
    if role is None:
        raise unspoken(message)
    if role not in ("system", "user", "assistant"):
        raise BadRow("unknown_role", f"role {str(role)[:40]!r}; known are system, user, assistant")
    content = _written(content)
    if not isinstance(content, str):
        raise BadRow("not_text", f"content is of type {type(content).__name__}")
    return {"role": role, "content": _readable(content)}


def _readable(text: str) -> str:
    """The text clean. Raises BadRow: not_text, where it was decoded wrongly."""
    if (found := _FOREIGN.search(text)) is not None:
        raise BadRow("not_text", f"U+{ord(found.group()):04X} in it: it was decoded in another encoding than its own")
    return clean(text)
