"""What the first rows of a source look like, beside what they say: damaged texts, answers that begin with their prompt or a label.

Nothing is changed or dropped for it. It is said once a source, where there is enough of it not to be a row's own matter.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.layout import HALF
from stages.pairs.columns import BY_CHANCE, tells
from stages.pairs.read import RawPair
from stages.text.dialogue import COLON
from stages.text.messages import BadRow
from stages.text.misread import misread
from stages.text.unread import USERS
from stages.text.written import inside

_AROUND = 24
"""Characters that may stand before a prompt that an answer repeats, and that are shown around a damage."""
_SHOWN = 60
_NAMES = (
    "TL;DR|Response|Answer|A|Reply|Output|Completion|Assistant|AI|Bot|GPT|ChatGPT|Model|Antwort|Réponse|Respuesta|Resposta|Risposta"
    "|Antwoord|Odpowiedź|Ответ|Відповідь|Cevap|Yanıt|回答|答案|答|回复|応答|답변|응답|الإجابة|الرد|उत्तर|คำตอบ|Jawaban|Trả lời|Jibu"
)
_LABEL = re.compile(
    rf"(?:#{{1,6}} ?)?[*_]{{0,2}}(?P<name>{_NAMES})[*_]{{0,2}} ?[:：]|#{{1,6}} ?(?P<head>{_NAMES})[ \t]*\n|<(?P<tag>{_NAMES})>",
    re.IGNORECASE,
)
"""What a template or a file puts before an answer: "Answer:", "### Response:", "<assistant>"."""
_RUN_ON = re.compile(
    rf"\n[ \t]*(?:(?:#{{1,6}} ?)?[*_]{{0,2}}(?:{USERS})[*_]{{0,2}}{COLON}|#{{1,6}} ?(?:{USERS})[ \t]*(?:\n|\Z))"
)
"""Where a model that was not stopped speaks for the user."""
_SEEN = 0.02
"""Share of the pairs from which on such a thing is said."""
_ENTITY = re.compile(r"&(?:#39;|#x27;|#34;|quot;|apos;|#x200b;|amp;(?:#\w{1,8}|[a-z]{2,8});)", re.IGNORECASE)
_ESCAPE = re.compile(r"(?<!\\)\\n(?:\\n|[ \t]*(?:[A-Z0-9#*-]|\Z))|(?<=\w)\\u0[0-9a-f]{3}|(?:\\u[0-9a-fA-F]{4}){2}")
"""Line breaks where sentences end, and letters inside words; not the `\\n` before a quotation mark or LaTeX's `\\neq`."""
_EXCEL = re.compile(r"_x00[01][0-9A-F]_")
_BEFORE = "[a-z0-9.,;:!?)]"
_TOKENS = re.compile(
    r"(?<![`\"'“‘«「])(?:<0x[0-9A-F]{2}>|<(?:unk|pad)>)(?![`\"'”’»」])|(?<!\S)⁇(?!\S)|▁\w{1,40}[^\w\s]{0,3}▁\w{1,40}[^\w\s]{0,3}▁"
    rf"|{_BEFORE}(?:Ġ|ĊĊ?)[^\sĠĊ](?s:.{{0,200}}?){_BEFORE}(?:Ġ|ĊĊ?)[^\sĠĊ]|(?:(?<!\S)Ġ[a-z0-9]+\s){{3}}"
)
"""Bytes, unknown tokens, and what stands for spaces and line breaks. Ġ and Ċ are letters of Maltese: there they begin words, and do
not follow small letters twice, nor begin three words in a row."""


@dataclass(frozen=True)
class _Damage:
    """pattern: None for letters of another encoding. least: share of the rows that is worth saying."""

    what: str
    pattern: re.Pattern[str] | None
    least: float


_ESCAPED = _Damage(r"line breaks or letters written as \n, \u00e9", _ESCAPE, 0.1)
_DAMAGES = (
    _Damage("escapes that colour a terminal (of which [31m and the like are left)", re.compile(r"\x1b\[[0-9;?]*[A-Za-z]"), 0.0),
    _Damage("letters decoded in another encoding than their own (â€™, Ã¼)", None, 0.01),
    _Damage("markup of HTML (<p>)", re.compile(r"\A\s*<(?:p|div)>"), 0.1),
    _Damage("entities of HTML (&#39;, &quot;)", _ENTITY, 0.02),
    _ESCAPED,
    _Damage("escapes of Excel (_x000D_)", _EXCEL, 0.01),
    _Damage("what a tokenizer left (<0x0A>, <unk>, Ġ for spaces)", _TOKENS, 0.01),
)  # fmt: skip


class Looks:
    """Counts what rows look like. For the first rows of each file of a source."""

    def __init__(self) -> None:
        self._rows = self._pairs = self._told = self._broken_lines = 0
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def row(self, row_id: str, cells: Mapping[str, Any], pairs: Sequence[RawPair | BadRow]) -> None:
        """Look at a row: its cells as the data has them, and its pairs."""
        self._rows += 1
        texts = [text for text in inside(list(cells.values())) if isinstance(text, str)]
        self._broken_lines += any("\n" in text.strip() for text in texts)
        for damage in _DAMAGES:
            found = next(filter(None, (_find(damage, text) for text in texts)), None)
            if found is not None:
                self._counts[damage.what] += 1
                self._examples.setdefault(damage.what, f"{_around(found)!r} in {row_id}")
        if (pair := next((pair for pair in pairs if isinstance(pair, RawPair)), None)) is not None:
            self._answers(row_id, pair)

    def notes(self) -> Iterator[str]:
        """What is worth saying of the rows."""
        begun, labelled, repeated = (self._counts[kind] for kind in ("begun", "labelled", "repeated"))
        if begun >= min(BY_CHANCE, self._pairs) > 0 and (
            labelled >= HALF * self._pairs or repeated >= max(1, HALF * self._told)
        ):
            yield (
                f"in {begun:,} of {self._pairs:,} rows looked at an answer begins with its prompt or with a label, for example "
                f"{self._examples['begun']}: it would be learnt as part of the answer. Cut it off, or leave it if it belongs there"
            )
        if (untold := self._counts["untold"]) and untold >= _SEEN * self._pairs:
            yield (
                f"in {untold:,} of {self._pairs:,} rows looked at the prompt says more than the conversations, for example {self._examples['untold']}: "
                "the conversations are what is taken. If it belongs to what is asked, put it into them"
            )
        if (run_on := self._counts["run on"]) and run_on >= _SEEN * self._pairs:
            yield (
                f"in {run_on:,} of {self._pairs:,} rows looked at an answer goes on with the user's next turn, for example "
                f"{self._examples['run on']}: it would be learnt so. Cut it off, or leave it if it belongs there"
            )
        for damage in _DAMAGES:
            count = self._counts[damage.what]
            if not count or count < damage.least * self._rows:
                continue
            if damage is _ESCAPED and self._broken_lines >= HALF * self._rows:
                continue
            yield (
                f"{count:,} of {self._rows:,} rows looked at have {damage.what}, for example {self._examples[damage.what]}: "
                "they would be learnt so. Mend them in the data"
            )

    def _note(self, kind: str, example: str) -> None:
        self._counts[kind] += 1
        self._examples.setdefault(kind, example)

    def _answers(self, row_id: str, pair: RawPair) -> None:
        self._pairs += 1
        prompt, answers = pair.prompt[-1]["content"], (pair.chosen, pair.rejected)
        if pair.untold:
            self._note("untold", f"{pair.untold[:_SHOWN]!r} in {row_id}")
        if (run_on := next(filter(None, map(_RUN_ON.search, answers)), None)) is not None:
            self._note("run on", f"{_around(run_on)!r} in {row_id}")
        told = tells(prompt)
        self._told += told
        repeating = [answer for answer in answers if told and answer.find(prompt, 0, len(prompt) + _AROUND) >= 0]
        labels = {_label(answer) for answer in answers}
        label = labels.pop() if len(labels) == 1 else ""
        labelled = bool(label) and f"{label}:" not in prompt.casefold()
        self._counts["repeated"] += bool(repeating)
        self._counts["labelled"] += labelled
        if repeating or labelled:
            self._counts["begun"] += 1
            begins = (repeating or answers)[0][:_SHOWN]
            self._examples.setdefault("begun", f"{begins!r} in {row_id}")


def _find(damage: _Damage, text: str) -> re.Match[str] | None:
    """Where a text has a damage; fenced code may hold entities, and a text with line breaks of its own escaped ones."""
    if damage.pattern is None:
        return misread(text)
    if (damage.pattern is _ENTITY and "```" in text) or (damage is _ESCAPED and ("\\" not in text or "\n" in text)):
        return None
    return damage.pattern.search(text)


def _around(found: re.Match[str]) -> str:
    return found.string[max(0, found.start() - _AROUND) : found.end() + _AROUND]


def _label(answer: str) -> str:
    """The label that an answer begins with, casefolded; empty where there is none."""
    found = _LABEL.match(answer)
    return (found["name"] or found["head"] or found["tag"]).casefold() if found else ""
