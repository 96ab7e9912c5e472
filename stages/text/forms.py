"""The forms in which data sets store a conversation, as one: a list of {role, content}, content a text.

Known are lists of {role, content}, {from, value} (ShareGPT) and the like, one message instead of a list, a dict of a list
of roles and one of contents, content in parts, thoughts in a field of their own; each of these written as JSON or as Python
prints it; and dialogues written as one text ("Human: ... Assistant: ...").
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from stages.cells import MISSING_WORDS, Unreadable
from stages.text.messages import BadRow, unspoken

Tell = Callable[[str], None]

_ROLES = {
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
_CONTENT_KEYS = ("content", "value", "text", "message")
_THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
_UNREAD = frozenset(
    ("reasoning_details", "thought", "thoughts", "audio", "images", "image", "refusal", "documents", "function_call")
)
"""Keys of messages that say something and are not read."""
_WRAPPERS = ("messages", "conversations", "conversation")
_SYSTEM_KEYS = ("system", "system_prompt")
"""Keys of a system message beside the messages."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_THOUGHT_PARTS = ("thinking", "reasoning")

_STRUCTURE = re.compile(r"""\s*(?:"\s*)?(?:array\()?[\[{]""")
_WRITTEN = re.compile(
    r"""\s*(?:array\()?\[?\s*\{\s*["'](?:role|from|speaker|content|value|messages|conversations)["']\s*:"""
)
_LONGEST_PYTHON = 1_000_000
_LAST = 100  # characters
_PRINTED = re.compile(
    r"""(?P<value>'(?:\\.|[^'\\])*(?:'|\\?\Z)|"(?:\\.|[^"\\])*(?:"|\\?\Z)|\d[\w.+-]*|(?P<missing>\bnan\b|-?\binf\b|\bNone\b|<NA>))"""
    r"""(?P<next>\s+(?=['"<\d.+-]|nan\b|inf\b|None\b))?|(?P<end>[}\])])\s+(?=[{\[(]|array\()"""
    r"""|(?P<array>\b(?:array|(?:np|numpy)\.\w+)\()|(?P<kind>,\s*dtype=\w+(?=\)))""",
    re.DOTALL,
)
"""Values, also a text that does not end (or every quote in it would be tried as a beginning), and what numpy puts around and between them."""
_MARK = (
    r"<[|｜][^<>|｜\s]{1,40}[|｜]?>|\[/?INST\]|\[(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|gMASK)\]"
    r"|<(?:start_of_turn|end_of_turn|extra_id_1|BOS_TOKEN|bos|eos)>"
)
_BEGUN, _ENDED = re.compile(rf"\s*(?:<s>\s*)?(?:{_MARK})"), re.compile(rf"(?:{_MARK}|</s>)\s*\Z")
"""A control mark where a template puts one: `<|...|>` and DeepSeek's `<｜...｜>`, and those that are written otherwise."""
_COLON = r"\s?[:：]"
_FULL = "Human|User|Assistant|System|Bot|AI|GPT"
_OPENING = re.compile(rf"\s*(?:#{{1,4}} ?)?(?:Human|User|H|System){_COLON}", re.IGNORECASE)
_ANSWER = re.compile(rf"\n\s*(?:#{{1,4}} ?)?(?:Assistant|A|Bot|AI|GPT){_COLON}", re.IGNORECASE)
_NAMED = re.compile(rf"\s*(?:#{{1,4}} ?)?(?:Human|User|Assistant){_COLON}\s*\S", re.IGNORECASE)
_TURNS = tuple(
    tuple(
        re.compile(rf"(?:\A\s*|{apart})((?:#{{1,4}} ?)?(?:{names})){_COLON}", re.IGNORECASE)
        for apart in (r"\n[^\S\n]*\n\s*", r"\n\s*")
    )
    for names in (_FULL, f"H|A|{_FULL}")
)
"""Where turns begin, after an empty line and after any line break, by full names and by short ones (H, A) as well."""
_HASHED = re.compile(rf"(?<!#)(#{{1,4}} ?(?:{_FULL})){_COLON}", re.IGNORECASE)
"""Turns of guanaco's dialogues: "### Human: ...### Assistant: ...", on a line of their own or not."""
_INLINE = re.compile(rf"(?:\A\s*|(?<=[\s。！？]))(Human|User|Assistant){_COLON}", re.IGNORECASE)
_CAPITALS = re.compile(r"(?:\A|\s|</s>)(USER|HUMAN|ASSISTANT|SYSTEM):")
"""Turns of dialogues on one line, as Vicuna's: "... USER: ... ASSISTANT: ..."."""
_ALPACA = re.compile(r"^(#{1,4} ?(?:Instruction|Response))\s?:", re.IGNORECASE | re.MULTILINE)
"""Turns of Alpaca's template: "### Instruction: ... ### Response: ..."; an "### Input:" belongs to the instruction."""
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
        if value.get("tools") not in (None, "", "[]", [], {}):
            tell("tools beside messages are not read")
        value = listed
    if not (isinstance(value, list) and value and all(isinstance(message, dict) for message in value)):
        return value
    if not any(_key(message, _ROLE_KEYS) for message in value):
        return value
    return [_message(message, tell) for message in value]


def written_conversation(text: str, tell: Tell) -> Any:
    """The conversation that a text is, as JSON, Python or numpy writes it; None for any other text.

    Unreadable for a text that begins as one and cannot be parsed.
    """
    if not _STRUCTURE.match(text):
        return None
    value, how = _parsed(text)
    if isinstance(value, str) and _STRUCTURE.match(value):  # JSON in JSON
        value, how = _parsed(value)
    if how is None:
        broken = _WRITTEN.match(text) is not None
        return Unreadable("not_text", "messages written as a text that cannot be parsed") if broken else None
    if not is_conversation(value):
        return None
    tell(f"{how} read as messages")
    return value


def written_texts(text: str, tell: Tell) -> list[str | None] | None:
    """The texts of a list of texts that a text is, as JSON, Python or numpy writes it; None for any other text."""
    if text.lstrip()[:1] != "[":
        return None
    value, how = _parsed(text)
    if not isinstance(value, list) or not value or not all(isinstance(answer, str | None) for answer in value):
        return None
    tell(f"{how} read as a list of texts")
    return value


def written_lists(text: str, tell: Tell) -> Any:
    """The list or dict that a text is, as JSON, Python or numpy writes it; Unreadable for any other text."""
    value, how = _parsed(text)
    if how is None:
        return Unreadable("not_text", "a text that cannot be parsed as a list")
    tell(f"{how} read as lists")
    return value


def _parsed(text: str) -> tuple[Any, str | None]:
    """(value, how it is written); (None, None) for what is neither JSON nor Python nor numpy's print of an array."""
    try:
        return json.loads(text), "JSON text"
    except (ValueError, RecursionError):
        pass
    try:
        if len(text) <= _LONGEST_PYTHON:
            return ast.literal_eval(_PRINTED.sub(_as_python, text.strip())), "text as Python prints it"
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):  # TypeError: a set of sets
        pass
    return None, None


def _as_python(found: re.Match[str]) -> str:
    """A piece of what numpy prints, as Python has it: commas between elements, no word array, None for nan. Texts stay as they are."""
    if found["value"] is not None:
        return ("None" if found["missing"] else found["value"]) + ("," if found["next"] else "")
    return found["end"] + "," if found["end"] else "(" if found["array"] else ""


def is_conversation(value: Any) -> bool:
    """Whether a value is messages in a form that `conversation` knows: every message says who speaks and what."""
    if isinstance(value, dict):
        value = _listed(value)
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and isinstance(m.get(_key(m, _ROLE_KEYS) or "role"), str) for m in value)
        and all(
            m.get("tool_calls") or m.get("function_call") or any(name in m for name in _CONTENT_KEYS) for m in value
        )
    )


def looks_rendered(text: str) -> bool:
    """Whether a text begins or ends as a chat template's output does."""
    return _BEGUN.match(text) is not None or _ENDED.search(text, max(0, len(text) - _LAST)) is not None


def looks_spoken(text: str) -> bool:
    """Whether a text is a dialogue: it begins with a person's turn and has an assistant's after it, or with a turn that is
    named in full (Human, User, Assistant)."""
    return (
        _NAMED.match(text) is not None
        or _on_one_line(text)
        or _instructed(text)
        or (_OPENING.match(text) is not None and _ANSWER.search(text) is not None)
        or len(_hashed(text)) > 1
    )


def dialogue(text: str) -> list[dict[str, str]]:
    """The turns of a text that `looks_spoken`, as messages; an empty last turn of the assistant's is left out.

    Turns begin with one name of each side, the first that the text has (the assistant's: Assistant, if there is one), System only
    the first: other names are said inside. They begin after an empty line where each name does once, else after any line
    break; with hashes (### Human:) anywhere; and anywhere after a space where a text begins with a user's and no answer has a
    line of its own. Short names (H, A) begin one only in a text that begins with one: "A:" is an option of a question elsewhere.
    """
    if len(hashed := _hashed(text)) > 1:
        return _turns(text, hashed)
    if _on_one_line(text):
        text = text.replace("</s>", " ")
        return _turns(text, list(_CAPITALS.finditer(text)))
    if _instructed(text):
        return _turns(text, list(_ALPACA.finditer(text)))
    apart, any_line = _TURNS[0] if _TURNS[0][1].match(text) else _TURNS[1]
    marks, spaced = (_of_two(turn.finditer(text)) for turn in (any_line, apart))
    if set(map(_name, spaced)) == set(map(_name, marks)):
        marks = spaced
    return _turns(text, marks if _answered(marks) else _inline(text) or marks)


def _of_two(marks: Iterable[re.Match[str]]) -> list[re.Match[str]]:
    """The marks with the dialogue's two names, and the system's where it is the first."""
    named = [(mark, _name(mark)) for mark in marks]
    user = next((name for _, name in named if _role(name) == "user"), None)
    answering = [name for _, name in named if _role(name) == "assistant"]
    usual = "a" if user == "h" else "assistant"
    assistant = usual if usual in answering else next(iter(answering), None)
    return [
        mark
        for at, (mark, name) in enumerate(named)
        if name in (user, assistant) or (at == 0 and _role(name) == "system")
    ]


def _hashed(text: str) -> list[re.Match[str]]:
    """The marks with hashes of a text that begins with one, and has an answer's."""
    if text.lstrip()[:1] != "#":
        return []
    marks = _of_two(_HASHED.finditer(text))
    return marks if marks and not text[: marks[0].start()].strip() and _answered(marks) else []


def _inline(text: str) -> list[re.Match[str]]:
    """The marks of a dialogue on one line, named in the case of the first; none where it does not begin with a user's and has an answer."""
    marks = list(_INLINE.finditer(text))
    if not marks or text[: marks[0].start()].strip() or _role(_name(marks[0])) != "user":
        return []
    lower = marks[0].group(1).islower()
    marks = _of_two(mark for mark in marks if mark.group(1).islower() == lower)
    return marks if _answered(marks) else []


def _answered(marks: Iterable[re.Match[str]]) -> bool:
    return any(_role(_name(mark)) == "assistant" for mark in marks)


def _name(mark: re.Match[str]) -> str:
    return mark.group(1).lstrip("# ").lower().replace("ı", "i").replace("ſ", "s")  # re.IGNORECASE takes them too


def _role(name: str) -> str:
    return _SHORT.get(name) or _ROLES[name]


def _on_one_line(text: str) -> bool:
    """Whether a user's turn and an assistant's follow it in capitals, the assistant's not on a line of its own."""
    first = _CAPITALS.search(text) if "ASSISTANT:" in text else None
    if first is None or first.group(1) == "ASSISTANT":
        return False
    answer = text.find("ASSISTANT:", first.end())
    return answer > 0 and "\n" not in text[first.end() : answer].strip(" ")[-1:] and text[answer - 1] in " >"


def _instructed(text: str) -> bool:
    """Whether an instruction and a response follow each other, as Alpaca's template has them."""
    names = [mark.group(1).lstrip("# ").lower() for mark in _ALPACA.finditer(text)] if "#" in text else []
    return names[:2] == ["instruction", "response"]


def _turns(text: str, marks: Sequence[re.Match[str]]) -> list[dict[str, str]]:
    """The messages that begin at the marks; what stands before the first is the system's."""
    before = text[: marks[0].start()].strip()
    messages = [{"role": "system", "content": before}] if before else []
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        content = text[mark.end() : following.start() if following else len(text)].strip()
        messages.append({"role": _role(_name(mark)), "content": content})
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        messages.pop()
    return messages


def _listed(value: dict[Any, Any]) -> list[Any] | None:
    """The messages in a dict: under a key of it, a list of roles beside one of contents, or the dict itself."""
    for key in _WRAPPERS:
        inner = value.get(key)
        if isinstance(inner, str) and _STRUCTURE.match(inner):
            inner, _ = _parsed(inner)
        if isinstance(inner, list):
            return [*_system(value, inner), *inner]
    role, content = _key(value, _ROLE_KEYS), _key(value, _CONTENT_KEYS)
    if role is None or content is None:
        return None
    roles, contents = value[role], value[content]
    if isinstance(roles, list) and isinstance(contents, list) and len(roles) == len(contents):
        return [{"role": one, "content": other} for one, other in zip(roles, contents, strict=True)]
    return [value]


def _system(value: dict[Any, Any], messages: list[Any]) -> list[dict[str, str]]:
    """The system message that stands beside messages, unless they bring their own."""
    if not messages or not isinstance(messages[0], dict):
        return []
    first = messages[0]
    role, own = first.get(_key(first, _ROLE_KEYS) or "role"), first.get(_key(first, _CONTENT_KEYS) or "content")
    said = value.get(_key(value, _SYSTEM_KEYS) or "system")
    if not isinstance(said, str) or said.strip() in ("", *MISSING_WORDS):
        return []
    if _ROLES.get(str(role).strip().lower()) == "system" and own:
        return []
    return [{"role": "system", "content": said}]


def _key(message: dict[Any, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if message.get(name) is not None), None)


def _message(message: dict[Any, Any], tell: Tell) -> dict[str, Any]:
    if _key(message, _ROLE_KEYS) is None:
        raise unspoken(message)
    for key in _UNREAD.intersection(message):
        if message[key]:
            tell(f"{key} of messages is not read")
    role = message.get(_key(message, _ROLE_KEYS) or "role")
    known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    called = message.get("tool_calls") or (message.get("function_call") and _key(message, _CONTENT_KEYS) is None)
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


def _named(part: Any) -> str:
    """What a part that is no text is called."""
    if not isinstance(part, dict):
        return f"a {type(part).__name__}"
    if "type" in part:
        return f"a part of type {str(part['type'])[:40]!r}"
    return f"a part with the keys {', '.join(map(str, part))[:80]}"


def _joined(parts: list[Any]) -> tuple[str, str]:
    """(text, thought) of content in parts, joined by line feeds as vLLM joins them. Raises BadRow for other parts, by their type."""
    texts, thoughts = [], []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
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
