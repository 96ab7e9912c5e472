"""The forms in which data sets store a conversation, as one: a list of {role, content}, content a text (and `LEFT_OUT`).

Known are lists of {role, content}, {from, value} (ShareGPT) and the like, one message instead of a list, a dict of a list
of roles and one of contents, content in parts, thoughts in a field of their own; each of these also written as a text (`written.py`).
"""

from __future__ import annotations

import re
from typing import Any

from stages.cells import MISSING_WORDS, Unreadable
from stages.text.messages import BadRow, unspoken
from stages.text.written import TWICE, Tell, bare, inside, parsed, repeats

ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "person", "instruction", "question"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai", "llm", "bard", "bing", "answer", "response"),
        "assistant",
    ),
    **dict.fromkeys(("system", "developer", "sys"), "system"),
}
_TOOLS = (
    "tool",
    "tools",
    "function",
    "function_call",
    "function_response",
    "tool_call",
    "tool_response",
    "observation",
    "ipython",
)
_ROLE_KEYS = ("role", "from", "speaker", "author")
_CONTENT_KEYS = ("content", "value", "text", "message", "parts")
_THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
_UNREAD = frozenset(
    ("reasoning_details", "thought", "thoughts", "audio", "images", "image", "refusal", "documents", "function_call")
)
"""Keys of messages that say something and are not read."""
_LEARNT_KEYS = ("weight", "train", "training", "trainable", "loss", "loss_mask")
"""Keys by which messages say whether they are learnt: OpenAI's, axolotl's, ms-swift's."""
_LEFT_OUT = ("0", "0.0", "false")
LEFT_OUT = "left_out"
"""Key of an answer that the data leaves out of what is learnt: whoever learns from conversations looks at it."""
_TAKEN_KEYS = ("if_chosen", "is_chosen", "chosen", "is_selected", "selected")
"""Keys by which answers to one turn say which of them the conversation went on with: PRISM's."""
_EXCHANGES = (
    *(("input", "output"), ("human", "assistant"), ("user", "assistant"), ("human", "gpt"), ("question", "answer")),
    *(("instruction", "output"), ("instruction", "response"), ("prompt", "response"), ("prompt", "completion")),
)
"""Keys of an object that is a question and its answer, in lists that are conversations."""
_WRAPPERS = ("messages", "conversations", "conversation")
_SYSTEM_KEYS = ("system", "system_prompt", "system_message", "instructions")
"""Keys of a system message beside the messages."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_THOUGHT_PARTS = ("thinking", "reasoning")
_OTHER_PARTS = (
    *("image", "image_url", "input_image", "audio", "audio_url", "input_audio"),
    *("video", "video_url", "file", "input_file"),
)
"""Parts that are no text: whoever reads them refuses the row."""
_PAYLOADS = ("source", "image_url", "url", "text")
"""Keys of what a part holds, where it is not under the name of its type."""
_STRUCTURE = re.compile(r"""\s*(?:"\s*)?(?:array\()?[\[{]""")
_WRITTEN = re.compile(
    r"""\s*(?:array\()?\[?\s*\{\s*\\*["'](?:role|from|speaker|content|value|messages|conversations)\\*["']\s*:"""
)

_NAMED = re.compile(r"""["'](?:role|from|speaker|author|type)\\*["']\s*:""")
"""A key that every message or part of one has, as any notation writes it."""
_ALONGSIDE = frozenset(("type", "text", "annotations", "logprobs", "cache_control", "citations"))
"""Keys of a part that is text: it has no others with something in them."""


def conversation(value: Any, tell: Tell) -> Any:
    """`value` as messages if it is a conversation in a form that is known, else as it is.

    tell: called with what was read as what. Raises BadRow: not_text (a part or content that is no text), tool_calls.
    """
    if isinstance(value, dict):
        listed = _listed(value)
        if listed is None:
            return value
        tell("a dict read as a list of messages" if len(listed) != 1 else "one message read as a list of messages")
        if _says(value.get("tools")):
            tell("tools beside messages are not read")
        value = listed
    if not (isinstance(value, list) and value and all(isinstance(message, dict) for message in value)):
        return value
    if not any(_key(message, _ROLE_KEYS) for message in value):
        exchanges = _exchanges(value, tell)
        return _said_in_parts(value, tell) if exchanges is None else exchanges
    went_on = [message for message in value if not any(message.get(key) is False for key in _TAKEN_KEYS)]
    if len(went_on) < len(value):
        tell(f"answers that the conversation did not go on with ({', '.join(_TAKEN_KEYS)}: false) are left out")
    return [_message(message, tell) for message in went_on]


def _exchanges(value: list[dict[Any, Any]], tell: Tell) -> list[dict[str, str]] | None:
    """The messages of objects that hold a question and its answer each, a system message before the first; None: they do not."""
    names = next(
        (pair for pair in _EXCHANGES if all(isinstance(one.get(key), str) for one in value for key in pair)), None
    )
    if names is None:
        return None
    tell(f"{names[0]} and {names[1]} of a conversation read as its turns")
    said = next((one for key in _SYSTEM_KEYS if isinstance(one := value[0].get(key), str) and one.strip()), None)
    turns = [
        {"role": role, "content": one[key]}
        for one in value
        for role, key in zip(("user", "assistant"), names, strict=True)
    ]
    return [{"role": "system", "content": said}, *turns] if said else turns


def in_turn(value: Any) -> Any:
    """A list of texts as messages, the user's and the assistant's in turn, also where an exchange each is a list of two; of lists of a role and a
    text as these say; anything else as it is."""
    if isinstance(value, list) and value and all(isinstance(one, list) and len(one) == 2 for one in value):
        if all(isinstance(role, str) and role.strip().lower() in ROLES for role, _ in value):
            return [{"role": ROLES[role.strip().lower()], "content": text} for role, text in value]
        value = [text for exchange in value for text in exchange]
    if not (isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) for text in value)):
        return value
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(value)]


def _said_in_parts(value: list[Any], tell: Tell) -> Any:
    """The text of a list that is content in parts, without a message around it; any other list as it is. Raises BadRow for other parts."""
    if not (
        _are_parts(value)
        or (all("type" in part for part in value) and any(part["type"] in _TEXT_PARTS for part in value))
    ):
        return value
    text, thought = _joined(value)
    tell("content in parts read as one text")
    return f"<think>\n{thought}\n</think>\n\n{text}" if thought else text


def written_conversation(text: str, tell: Tell) -> Any:
    """The conversation that a text is, as JSON, Python or numpy writes it; None for any other text.

    Unreadable for a text that begins as one and cannot be parsed, or has a key twice in one object.
    """
    text = bare(text)
    if not _STRUCTURE.match(text) or not (_NAMED.search(text) or _WRITTEN.match(text)):
        return None
    value, how = parsed(text)
    if isinstance(value, str) and _STRUCTURE.match(value):  # JSON in JSON
        value, how = parsed(value)
    if how is None:
        broken = _WRITTEN.match(text) is not None
        return Unreadable("not_text", "messages written as a text that cannot be parsed") if broken else None
    if isinstance(value, dict) and _is_part(value):
        value = [value]
    if not (is_conversation(value) or _are_parts(value)):
        return None
    if repeats(value):
        return Unreadable("not_text", TWICE)
    tell(f"{how} read as {'one text' if _are_parts(value) else 'messages'}")
    return value


def _are_parts(value: Any) -> bool:
    """Whether a value is content in parts, without a message around it."""
    return isinstance(value, list) and bool(value) and all(map(_is_part, value))


def _is_part(value: Any) -> bool:
    """Whether an object is a part: it holds what its type says. Other JSON has types, too."""
    if not isinstance(value, dict) or not isinstance(kind := value.get("type"), str):
        return False
    if kind in _TEXT_PARTS:
        others = value.keys() - _ALONGSIDE
        return isinstance(value.get("text"), str) and all(value[key] is None for key in others)
    holds = len(value) == 1 or any(  # alone: the picture is in another column
        key in value for key in (kind, *_PAYLOADS)
    )
    return kind in (*_THOUGHT_PARTS, *_OTHER_PARTS) and holds


def _parts_written(text: str) -> list[Any] | None:
    """The list of parts that a text is, as JSON or Python writes it; None for any other text, a single object too."""
    text = bare(text)
    if not _STRUCTURE.match(text) or not _NAMED.search(text):
        return None
    value, _ = parsed(text)
    return value if _are_parts(value) else None


def is_conversation(value: Any) -> bool:
    """Whether a value is messages in a form that `conversation` knows: every message says who speaks and what."""
    if isinstance(value, dict):
        value = _listed(value)
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and isinstance(m.get(_key(m, _ROLE_KEYS) or "role"), str) for m in value)
        and all(
            _says(m.get("tool_calls")) or _says(m.get("function_call")) or any(name in m for name in _CONTENT_KEYS)
            for m in value
        )
    )


def _listed(value: dict[Any, Any]) -> list[Any] | None:
    """The messages in a dict: under a key of it, a list of roles beside one of contents, or the dict itself."""
    for key in _WRAPPERS:
        inner = value.get(key)
        if isinstance(inner, str) and _STRUCTURE.match(inner):
            inner, _ = parsed(inner)
        if isinstance(inner, list):
            return [*_system(value, inner), *inner]
    role, content = _key(value, _ROLE_KEYS), _key(value, _CONTENT_KEYS)
    if role is None or content is None:
        return None
    roles, contents = value[role], value[content]
    if isinstance(roles, list) and isinstance(contents, list) and len(roles) == len(contents):
        beside = {key: one for key, one in value.items() if isinstance(one, list) and len(one) == len(roles)}
        messages = [dict(zip(beside, cells, strict=True)) for cells in zip(*beside.values(), strict=True)]
        return [*_system(value, messages), *messages]
    return [value]


def _system(value: dict[Any, Any], messages: list[Any]) -> list[dict[str, Any]]:
    """The system message that stands beside messages, unless they bring their own."""
    if not messages or not isinstance(messages[0], dict):
        return []
    first = messages[0]
    role, own = first.get(_key(first, _ROLE_KEYS) or "role"), first.get(_key(first, _CONTENT_KEYS) or "content")
    said = next((value[key] for key in _SYSTEM_KEYS if _says(value.get(key))), None)
    if said is None or (ROLES.get(str(role).strip().lower()) == "system" and own):
        return []
    spoken = (
        said if isinstance(said, list) and any(isinstance(s, dict) and _key(s, _ROLE_KEYS) for s in said) else [said]
    )
    return [{"role": "system", "content": _content(one)} for one in spoken]


def _content(said: Any) -> Any:
    """What a message says, where it is one; a part of content, a text, and what cannot be read, as it is."""
    is_message = isinstance(said, dict) and "type" not in said
    return said.get(_key(said, _CONTENT_KEYS) or "content", said) if is_message else said


def _says(value: Any) -> bool:
    """Whether there is anything in a cell: not where all of it is missing or empty, also as a text ("[]", "null"). An empty
    object in a list is something: a call of a tool."""
    if isinstance(value, list) and {} in value:
        return True
    texts = (one.strip() if isinstance(one, str) else one for one in inside(value) if not isinstance(one, dict | list))
    return any(one not in ("[]", "{}", *MISSING_WORDS) for one in texts if one)


def _key(message: dict[Any, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if message.get(name) is not None), None)


def _message(message: dict[Any, Any], tell: Tell) -> dict[str, Any]:
    if _key(message, _ROLE_KEYS) is None:
        raise unspoken(message)
    if repeats(message):
        raise BadRow("not_text", TWICE)
    for key in _UNREAD.intersection(message):
        if _says(message[key]):
            tell(f"{key} of messages is not read")
    if message.get("weight") not in (None, 0, 1):
        tell("weight of messages is not read, but for 0")
    role = message.get(_key(message, _ROLE_KEYS) or "role")
    known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    called = _says(message.get("tool_calls")) or (
        _says(message.get("function_call")) and _key(message, _CONTENT_KEYS) is None
    )
    if called or (isinstance(role, str) and role.strip().lower() in _TOOLS):
        raise BadRow("tool_calls")
    if known is not None and known != role:
        tell(f"role {str(role)[:40]} read as {known}")
    content = message.get(_key(message, _CONTENT_KEYS) or "content")
    if isinstance(content, Unreadable):
        raise BadRow(content.reason, content.detail)
    thought = next((message[key] for key in _THOUGHT_KEYS if isinstance(message.get(key), str)), "").strip()
    if isinstance(content, dict):
        content = [content]
    if isinstance(content, str) and (parts := _parts_written(content)) is not None:
        content = parts
    if isinstance(content, list):
        content, inside = _joined(content)
        thought = thought or inside
        tell("content in parts read as one text")
    if content is None:
        content = ""
    if thought and known == "assistant" and isinstance(content, str) and "</think>" not in content:
        tell("thoughts in a field of their own read as <think> blocks")
        content = f"<think>\n{thought}\n</think>\n\n{content}"
    if known == "assistant" and any(str(message.get(key)).lower() in _LEFT_OUT for key in _LEARNT_KEYS):
        return {"role": known, "content": content, LEFT_OUT: True}
    return {"role": known or role, "content": content}


def _named(part: Any) -> str:
    """What a part that is no text is called."""
    if not isinstance(part, dict):
        return f"a {type(part).__name__}"
    if part.get("type") is not None:
        return f"a part of type {str(part['type'])[:40]!r}"
    return f"a part with the keys {', '.join(map(str, part))[:80]}"


def _joined(parts: list[Any]) -> tuple[str, str]:
    """(text, thought) of content in parts, joined by line feeds as vLLM joins them. Raises BadRow for other parts, by their type."""
    texts, thoughts = [], []
    for part in parts:
        kind = (part.get("type") or "text") if isinstance(part, dict) else "text"
        if isinstance(part, dict) and part.get("thought") is True:  # Gemini's
            kind = "thinking"
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and kind in _TEXT_PARTS and "text" in part and isinstance(part["text"], str | None):
            texts.append(part["text"] or "")
        elif isinstance(part, dict) and kind in _THOUGHT_PARTS:
            inner = part.get(kind, part.get("text"))
            thoughts.append(_joined(inner)[0] if isinstance(inner, list) else str(inner or ""))
        elif part is not None:
            raise BadRow("not_text", f"content has {_named(part)}")
    return "\n".join(texts), "\n".join(thoughts).strip()
