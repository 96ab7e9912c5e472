"""Conversations out of untrusted data: one clean list of text messages, or the reason why there is none."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
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
_UNSEEN = "\u00ad\u034f\u180e\u200b\u200c\u200d\u2060\ufeff \n\t"
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
    as U+FFFD, no outer space."""
    text = _CONTROL.sub("", _BREAK.sub("\n", text))
    return unicodedata.normalize("NFC", storable(text)).strip()


def storable(text: str) -> str:
    """Lone surrogates, which JSON can carry and UTF-8 cannot, as U+FFFD."""
    return _SURROGATE.sub("\ufffd", text)


def comparable(text: str) -> str:
    """What two texts are compared by: NFC, casefolded, runs of white space as one space."""
    return _SPACE.sub(" ", unicodedata.normalize("NFC", text.casefold())).strip()


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
        raise BadRow("not_text", f"a value of type {type(value).__name__} instead of a text or a list of messages")
    messages = [_message(message) for message in value]
    begun = next((n for n, message in enumerate(messages) if message["role"] != "system"), len(messages))
    for number, message in enumerate(messages[begun:], start=begun + 1):
        if _is_empty(message):
            which = f"message {number} of {len(messages)}, the {message['role']}'s, is empty"
            raise BadRow("empty", which if len(messages) > 1 else "")
    said = [message for message in messages[:begun] if not _is_empty(message)] + messages[begun:]
    if not said:
        raise BadRow("empty")
    return said


def _is_empty(message: dict[str, str]) -> bool:
    return not message["content"].strip(_UNSEEN)


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
        system = system[0].get("content")
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
    """A number as a text: the answer 7 is one in JSON, and pandas makes 7.0 of it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return value
    whole = isinstance(value, float) and value.is_integer() and abs(value) < _WHOLE
    return str(int(value)) if whole else str(value)


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
