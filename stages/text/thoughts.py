"""Thoughts in answers: the block of reasoning that a thinking model writes before what it says, as <think> ... </think>.

A whole thought stands at the beginning of an answer, once. `text.thoughts` says what becomes of it in what is trained on;
marks anywhere else would be taken for template structure, so such answers are dropped and never rewritten.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stages.text.messages import BadRow, unpadded

Policy = Literal["keep", "strip", "drop"]

_KNOWN = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
_DECLARED = re.compile(r"<[\w:|-]{0,30}(?:think|thought|reason)[\w:|-]{0,30}>|\[\w{0,30}THINK\w{0,30}\]", re.IGNORECASE)
_TAG = r"<(?P<name>think|thinking|thoughts?|reasoning|seed:think|details(?=\s[^<>]{0,200}\btype=[\"']?reasoning\b))(?:\s[^<>]{0,200})?>"
"""A mark in other letters or with attributes: <Think>, <think duration="3">, <details type="reasoning">."""
_TAGGED = re.compile(rf"(?P<opening>{_TAG})(?P<thought>.*?)(?P<closing></(?P=name)\s*>)", re.IGNORECASE | re.DOTALL)
_CUT_OFF = re.compile(rf"{_TAG}.*?(?:</(?P=name)\s*>|\Z)", re.IGNORECASE | re.DOTALL)
_WRAPPED = re.compile(
    r"\s*<(?P<name>(?:final[ _-]?)?(?:answer|output|response|reply|solution))\s*>(?P<said>(?:(?!</?(?P=name)\b).)*)</(?P=name)\s*>\s*",
    re.IGNORECASE | re.DOTALL,
)
"""What some models put around all that they say after a thought."""
_SOLUTION = re.compile(r"\s*<\|begin_of_solution\|>(?P<said>.*)<\|end_of_solution\|>\s*", re.DOTALL)
_SENTENCE = ".!?。！？…"


@dataclass(frozen=True)
class Split:
    """An answer in its pieces, which joined are the answer: mark, thought, mark, and what is said.

    thought: None if there is none. intact: whether no mark stands where it would be taken for structure.
    """

    opening: str
    thought: str | None
    closing: str
    said: str
    intact: bool = True


class Thoughts:
    """Finds thoughts by the marks that are well known and those that a chat template declares.

    declared: the marks in the template itself: only those can be mistaken for structure.
    """

    def __init__(self, template: str) -> None:
        found = dict.fromkeys(_DECLARED.findall(template))
        own = [(mark, close) for mark in found if (close := _closing(mark)) in template]
        self._marks: Sequence[tuple[str, str]] = list(dict.fromkeys([*own, *_KNOWN]))
        self.declared = frozenset(mark for pair in self._marks for mark in pair if mark in template)

    def split(self, answer: str) -> Split:
        """The answer's thought and what it says after it."""
        start = len(answer) - len(answer.lstrip())
        known = any(answer.startswith(opening, start) for opening, _ in self._marks)
        if not known and (tagged := self._tagged(answer, start)) is not None:
            return tagged
        for opening, closing in self._marks:
            inside = start + len(opening)
            if answer.startswith(opening, start):
                stop = answer.find(closing, inside)
                if stop < 0:
                    return Split("", None, "", answer, intact=False)
                return self._whole(answer, inside, stop, closing)
            stop = answer.find(closing)
            if stop > 0 and opening not in answer and _parts(answer, stop, closing):  # the prompt had the opening mark
                return self._whole(answer, 0, stop, closing)
        return Split("", None, "", answer, intact=not self._stray(answer))

    def _tagged(self, answer: str, start: int) -> Split | None:
        """The pieces of an answer that begins with a mark in other letters or with attributes; None: it does not."""
        if _CUT_OFF.match(answer, start) is None:
            return None
        found = _TAGGED.match(answer, start)
        if found is None or f"<{found['name']}".casefold() in found["thought"].casefold():
            return Split("", None, "", answer, intact=False)
        return self._whole(answer, found.start("thought"), found.start("closing"), found["closing"])

    def said(self, answer: str) -> str:
        """What a reader is shown: the answer without thoughts, whole or not."""
        found = self.split(answer)
        text = found.said
        if not found.intact:
            for opening, closing in self._marks:
                text = re.sub(f"{re.escape(opening)}.*?(?:{re.escape(closing)}|\\Z)", "", text, flags=re.DOTALL)
            text = _CUT_OFF.sub("", text)
        return text.strip()

    def target(self, answer: str, policy: Policy) -> str:
        """What is learnt of an answer. A thought that is empty says nothing: templates put theirs in its place. Where thoughts are left
        out, an element around all that is said after one (<answer> ... </answer>) is too.

        Raises BadRow: thought (policy drop), broken_thought, empty (nothing is said after it).
        """
        found = self.split(answer)
        if not found.intact:
            raise BadRow("broken_thought", "marks of a thought that is not one whole thought before the answer")
        if found.thought is None:
            return answer
        said = unpadded(found.said)
        if not said:
            raise BadRow("empty", "nothing after the thought")
        if policy == "strip":
            return _unwrapped(said)
        if not found.thought.strip():
            return said
        if policy == "drop":
            raise BadRow("thought", f"{len(found.thought)} characters, text.thoughts: drop")
        return answer if found.opening else f"{self._opening_of(found.closing)}\n{answer}"

    def targets(self, chosen: str, rejected: str, policy: Policy) -> tuple[str, str]:
        """What is learnt of a pair's answers: `target` of each. Where one has a thought that is left out, an element around all of the other goes too:
        the two differ in what they say, not in their form.

        Raises BadRow as `target` does.
        """
        one, other = self.target(chosen, policy), self.target(rejected, policy)
        if policy == "strip" and (one is chosen) != (other is rejected):  # a thought was left out of the other alone
            one, other = (_unwrapped(one), other) if one is chosen else (one, _unwrapped(other))
        return one, other

    def opened_by(self, prompt: str) -> str:
        """The mark that a rendered prompt ends in, so that the answer begins inside a thought; "" if it does not."""
        end = prompt.rstrip()
        return next((opening for opening, _ in self._marks if end.endswith(opening)), "")

    def _whole(self, answer: str, inside: int, stop: int, closing: str) -> Split:
        thought, said = answer[inside:stop], answer[stop + len(closing) :]
        intact = not self._stray(thought) and not self._stray(said) and closing not in said
        if not intact:
            return Split("", None, "", answer, intact=False)
        return Split(answer[:inside], thought, closing, said)

    def _stray(self, text: str) -> bool:
        return any(mark in text for mark in self.declared)

    def _opening_of(self, closing: str) -> str:
        return next(opening for opening, close in self._marks if close == closing)


def _parts(answer: str, at: int, mark: str) -> bool:
    """Whether a mark without its opening begins or ends a line, or stands between a sentence and the next without a space, quoted by
    nothing: elsewhere in a line it is spoken of, not used."""
    before, after = answer[:at], answer[at + len(mark) :]
    if before.endswith("\n") or after.startswith("\n"):
        return True
    between = before[-1] in _SENTENCE and after[:1].isalnum()
    return between and not any(before.count(quote) % 2 for quote in '"`') and before.count("“") == before.count("”")


def unwrapped(said: str) -> str:
    """What is said in an element that is all there is."""
    found = _WRAPPED.fullmatch(said) or _SOLUTION.fullmatch(said)
    return said if found is None else unpadded(found["said"])


def _unwrapped(said: str) -> str:
    if not (inside := unwrapped(said)):
        raise BadRow("empty", "nothing in the element after the thought")
    return inside


def _closing(opening: str) -> str:
    return f"{opening[0]}/{opening[1:]}" if not opening.startswith("<|begin") else opening.replace("begin", "end")
