"""The forms in which data sets store a conversation, as one: a list of {role, content}, content a text.

Known are lists of {role, content}, {from, value} (ShareGPT) and the like, one message instead of a list, a dict of a list
of roles and one of contents, content in parts, thoughts in a field of their own; each of these written as JSON or as Python
prints it; and dialogues written as one text ("Human: ... Assistant: ...").
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from typing import Any

from stages.cells import Unreadable
from stages.text.messages import BadRow

Tell = Callable[[str], None]

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "person", "instruction", "question"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai", "llm", "bard", "bing", "answer"), "assistant"
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
_CONTENT_KEYS = ("content", "value", "text", "message")
_THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
_WRAPPERS = ("messages", "conversations", "conversation")
_TEXT_PARTS = ("text", "input_text", "output_text")
_THOUGHT_PARTS = ("thinking", "reasoning")

_WRITTEN = re.compile(r"""\s*[\[{].{0,200}?["'](?:role|from|speaker|messages|conversations)["']\s*:""", re.DOTALL)
_LONGEST_PYTHON = 1_000_000
_RENDERED = re.compile(
    r"\s*(?:<\|begin_of_text\|>|<s>|<bos>)?\s*(?:<\|im_start\|>|<\|start_header_id\|>|\[INST\]|<start_of_turn>|<\|(?:user|system|assistant|prompter)\|>)"
)
_NAMES = r"(?:#{1,4} ?)?(?:Human|User|H|Assistant|A|System|Bot|AI|GPT)"
_OPENING = re.compile(r"\s*(?:#{1,4} ?)?(?:Human|User|H|System)\s?:", re.IGNORECASE)
_ANSWER = re.compile(r"\n\s*(?:#{1,4} ?)?(?:Assistant|A|Bot|AI|GPT)\s?:", re.IGNORECASE)
_TURN_APART = re.compile(rf"(?:\A\s*|\n[^\S\n]*\n\s*)({_NAMES})\s?:", re.IGNORECASE)
_TURN = re.compile(rf"(?:\A\s*|\n\s*)({_NAMES})\s?:", re.IGNORECASE)
_SHORT = {"h": "user", "a": "assistant"}


def conversation(value: Any, tell: Tell) -> Any:
    """`value` as messages if it is a conversation in a form that is known, else as it is.

    tell: called with what was read as what. Raises BadRow: not_text (a part or content that is no text), tool_calls.
    """
    if isinstance(value, dict):
        listed = _listed(value)
        if listed is None:
            return value
        tell("a dict read as a list of messages" if len(listed) != 1 else "one message read as a list of messages")
        value = listed
    if not (isinstance(value, list) and value and all(isinstance(message, dict) for message in value)):
        return value
    if not any(_key(message, _ROLE_KEYS) for message in value):
        return value
    return [_message(message, tell) for message in value]


def looks_written(text: str) -> bool:
    """Whether a text looks like messages written down as JSON or Python."""
    return _WRITTEN.match(text) is not None


def written(text: str, tell: Tell) -> Any:
    """Messages out of a text that `looks_written`; Unreadable if it is neither JSON nor Python."""
    try:
        value = json.loads(text)
        tell("JSON text read as messages")
        return value
    except (ValueError, RecursionError):
        pass
    try:
        if len(text) <= _LONGEST_PYTHON:
            value = ast.literal_eval(text.strip())
            tell("text as Python prints it read as messages")
            return value
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        pass
    return Unreadable("not_text", "messages written as a text that is neither JSON nor Python")


def looks_rendered(text: str) -> bool:
    """Whether a text begins as a chat template's output does."""
    return _RENDERED.match(text) is not None


def looks_spoken(text: str) -> bool:
    """Whether a text is a dialogue: it begins with a person's turn and has an assistant's after it."""
    return _OPENING.match(text) is not None and _ANSWER.search(text) is not None


def dialogue(text: str) -> list[dict[str, str]]:
    """The turns of a text that `looks_spoken`, as messages; an empty last turn of the assistant's is left out.

    Turns begin after an empty line where the first answer does, else after any line break.
    """
    turn = _TURN_APART if len(_TURN_APART.findall(text)) > 1 else _TURN
    marks = list(turn.finditer(text))
    messages = []
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        name = mark.group(1).lstrip("# ").lower()
        content = text[mark.end() : following.start() if following else len(text)].strip()
        messages.append({"role": _SHORT.get(name) or _ROLES[name], "content": content})
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        messages.pop()
    return messages


def _listed(value: dict[Any, Any]) -> list[Any] | None:
    """The messages in a dict: under a key of it, a list of roles beside one of contents, or the dict itself."""
    for key in _WRAPPERS:
        if isinstance(value.get(key), list):
            return list(value[key])
    role, content = _key(value, _ROLE_KEYS), _key(value, _CONTENT_KEYS)
    if role is None or content is None:
        return None
    roles, contents = value[role], value[content]
    if isinstance(roles, list) and isinstance(contents, list) and len(roles) == len(contents):
        return [{"role": one, "content": other} for one, other in zip(roles, contents, strict=True)]
    return [value]


def _key(message: dict[Any, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if message.get(name) is not None), None)


def _message(message: dict[Any, Any], tell: Tell) -> dict[str, Any]:
    role = message.get(_key(message, _ROLE_KEYS) or "role")
    known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if message.get("tool_calls") or (isinstance(role, str) and role.strip().lower() in _TOOLS):
        raise BadRow("tool_calls")
    if known is not None and known != role:
        tell(f"role {str(role)[:40]} read as {known}")
    content = message.get(_key(message, _CONTENT_KEYS) or "content")
    if isinstance(content, Unreadable):
        raise BadRow(content.reason, content.detail)
    thought = next((message[key] for key in _THOUGHT_KEYS if isinstance(message.get(key), str)), "").strip()
    if isinstance(content, dict):
        content = [content]
    if isinstance(content, list):
        content, inside = _joined(content)
        thought = thought or inside
        tell("content in parts read as one text")
    if content is None:
        content = ""
    if thought and known == "assistant" and isinstance(content, str) and "</think>" not in content:
        tell("thoughts in a field of their own read as <think> blocks")
        content = f"<think>\n{thought}\n</think>\n\n{content}"
    return {"role": known or role, "content": content}


def _joined(parts: list[Any]) -> tuple[str, str]:
    """(text, thought) of content in parts, joined by line feeds as vLLM joins them. Raises BadRow for other parts, by their type."""
    texts, thoughts = [], []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and kind in _TEXT_PARTS and isinstance(part.get("text"), str | None):
            texts.append(part.get("text") or "")
        elif isinstance(part, dict) and kind in _THOUGHT_PARTS:
            inner = part.get(kind, part.get("text"))
            thoughts.append(_joined(inner)[0] if isinstance(inner, list) else str(inner or ""))
        elif part is not None:
            raise BadRow(
                "not_text",
                f"content has a part of type {str(kind)[:40]!r}"
                if isinstance(part, dict)
                else f"content has a {type(part).__name__}",
            )
    return "\n".join(texts), "\n".join(thoughts).strip()
