"""Dialogues that are written as one text: "Human: ... Assistant: ..."."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from stages.text.forms import ROLES
from stages.text.written import UNSEEN, bare

COLON = r"\s?[:：]"
_USER = "Human|User|Prompter"
_ANSWERING = "Assistant|Bot|Chatbot|AI|GPT|ChatGPT|GPT-?[34](?:\\.\\d)?|Claude|Bard|LaMDA"
_FULL = f"{_USER}|System|{_ANSWERING}"
_OPENING = re.compile(rf"\s*(?:#{{1,4}} ?)?(?:{_USER}|H|System){COLON}", re.IGNORECASE)
_ANSWER = re.compile(rf"\n[^\S\n]*[{UNSEEN}]*(?:#{{1,4}} ?)?(?:A|{_ANSWERING}){COLON}", re.IGNORECASE)
_NAMED = re.compile(rf"\s*(?:#{{1,4}} ?)?(?:{_USER}|Assistant){COLON}\s*\S", re.IGNORECASE)
_ANSWERER = re.compile(rf"\n[^\S\n]*[{UNSEEN}]*(?:#{{1,4}} ?)?(?:{_ANSWERING}){COLON}", re.IGNORECASE)
"""A last line that is the name of who is to answer."""
_USERS = re.compile(rf"^[^\S\n]*[{UNSEEN}]*(?:#{{1,4}} ?)?(?:{_USER}){COLON}", re.IGNORECASE | re.MULTILINE)
_NAME_LAST = re.compile(r"\n[^\S\n]*[^\W\d][\w .-]{0,20}\s?[:：]\Z")
_TURNS = tuple(
    tuple(
        re.compile(rf"(?:\A\s*|{apart})[{UNSEEN}]*((?:#{{1,4}} ?)?(?:{names})){COLON}", re.IGNORECASE)
        for apart in (r"\n[^\S\n]*\n\s*", r"\n\s*")
    )
    for names in (_FULL, f"H|A|{_FULL}")
)
"""Where turns begin, after an empty line and after any line break, by full names and by short ones (H, A) as well."""
_HASHED = re.compile(rf"(?<!#)(#{{1,4}} ?(?:{_FULL})){COLON}", re.IGNORECASE)
"""Turns of guanaco's dialogues: "### Human: ...### Assistant: ...", on a line of their own or not."""
_INLINE = re.compile(rf"(?:\A\s*|(?<=[\s。！？]))(Human|User|Assistant){COLON}", re.IGNORECASE)
_CAPITALS = re.compile(r"(?:\A|\s|</s>)(USER|HUMAN|ASSISTANT|GPT|SYSTEM):")
_CAPITAL_ANSWER = re.compile("(?:ASSISTANT|GPT):")
_KOALA = "BEGINNING OF CONVERSATION:"
"""What Koala's and Safe-RLHF's template puts before the first turn; it says nothing."""
"""Turns of dialogues on one line, as Vicuna's: "... USER: ... ASSISTANT: ..."."""
_ALPACA = re.compile(r"^(#{1,4} ?(?:Instruction|Response))\s?:", re.IGNORECASE | re.MULTILINE)
"""Turns of Alpaca's template: "### Instruction: ... ### Response: ..."; an "### Input:" belongs to the instruction."""
_SHORT = {"h": "user", "a": "assistant"}


def looks_spoken(text: str) -> bool:
    """Whether a text is a dialogue: it begins with a person's turn and has an assistant's after it, or with a turn that is
    named in full (Human, User, Assistant)."""
    text = bare(text)
    return (
        (_NAMED.match(text) is not None and not unanswered(text))
        or _on_one_line(text)
        or _instructed(text)
        or (_OPENING.match(text) is not None and _ANSWER.search(text) is not None)
        or _introduced(text)
        or len(_hashed(text)) > 1
    )


def unanswered(text: str) -> bool:
    """Whether a text begins with a user's turn and goes on with one, or with a name at its end, and nobody that is known answers."""
    text = bare(text).rstrip()
    if _OPENING.match(text) is None or _ANSWER.search(text) is not None or _on_one_line(text) or _inline(text):
        return False
    return len(_USERS.findall(text)) > 1 or ("\n" in text and _NAME_LAST.search(text) is not None)


def dialogue(text: str) -> list[dict[str, str]]:
    """The turns of a text that `looks_spoken`, as messages; an empty last turn of the assistant's is left out.

    Turns begin with one name of each side, the first that the text has (the assistant's: Assistant, if there is one), System only
    the first: other names are said inside. They begin after an empty line where each name does once, else after any line
    break; with hashes (### Human:) anywhere; and anywhere after a space where a text begins with a user's and no answer has a
    line of its own. Short names (H, A) begin one only in a text that begins with one: "A:" is an option of a question elsewhere.
    """
    text = bare(text)
    if len(hashed := _hashed(text)) > 1:
        return _turns(text, hashed)
    if _on_one_line(text):
        text = text.replace("</s>", " ")
        return _turns(text, list(_CAPITALS.finditer(text)))
    if _instructed(text):
        return _turns(text, list(_ALPACA.finditer(text)))
    apart, any_line = _TURNS[0] if _TURNS[0][1].match(text) or _introduced(text) else _TURNS[1]
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
    return _SHORT.get(name) or ROLES.get(name, "assistant")


def _introduced(text: str) -> bool:
    """Whether a text has a preamble, a user's turn, and at its end the name of who is to answer."""
    text = text.rstrip()
    last = text.rfind("\n")
    if last < 0 or _ANSWERER.fullmatch(text, last) is None:
        return False
    user = _USERS.search(text, 0, last)
    return user is not None and bool(text[: user.start()].strip())


def _on_one_line(text: str) -> bool:
    """Whether a user's turn and an assistant's follow it in capitals, the assistant's not on a line of its own."""
    first = _CAPITALS.search(text) if "ASSISTANT:" in text or "GPT:" in text else None
    if first is None or first.group(1) in ("ASSISTANT", "GPT"):
        return False
    found = _CAPITAL_ANSWER.search(text, first.end())
    answer = found.start() if found else 0
    return answer > 0 and "\n" not in text[first.end() : answer].strip(" ")[-1:] and text[answer - 1] in " >"


def _instructed(text: str) -> bool:
    """Whether an instruction and a response follow each other, as Alpaca's template has them."""
    names = [mark.group(1).lstrip("# ").lower() for mark in _ALPACA.finditer(text)] if "#" in text else []
    return names[:2] == ["instruction", "response"]


def _turns(text: str, marks: Sequence[re.Match[str]]) -> list[dict[str, str]]:
    """The messages that begin at the marks; what stands before the first is the system's."""
    before = text[: marks[0].start()].strip().removeprefix(_KOALA).strip()
    messages = [{"role": "system", "content": before}] if before else []
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        content = text[mark.end() : following.start() if following else len(text)].strip()
        messages.append({"role": _role(_name(mark)), "content": content})
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        messages.pop()
    return messages
