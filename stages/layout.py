"""How a file lays its rows out: which columns it has, and in what form its texts are, decided once from its first rows.

What was read as what is said once a file (`notes`), never guessed in silence; a column that is missing is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from schemas.errors import UserError
from stages.cells import Unreadable, plain
from stages.text.forms import (
    conversation,
    dialogue,
    looks_rendered,
    looks_spoken,
    looks_written,
    written,
)
from stages.text.messages import BadRow

LOOKED_AT = 1000
"""Rows that decide a file's layout."""

_OTHER_NAMES = {
    "prompt": ("question", "instruction", "input", "query", "problem", "user", "text", "messages", "conversations"),
    "chosen": ("preferred", "accepted", "winner", "positive", "better", "response_chosen", "completions", "responses"),
    "rejected": ("dispreferred", "loser", "negative", "worse", "response_rejected"),
    "messages": ("conversations", "conversation", "dialogue", "dialog", "chat", "turns"),
    "completion": ("response", "answer", "output", "completions", "target"),
    "language": ("lang", "locale", "language_code", "lang_code"),
    "group_id": ("group", "id", "translation_id", "task_id"),
    "system": ("system_prompt", "instruction"),
}


class Layout:
    """The layout of one file.

    notes: what was read as what, not said yet. Raises UserError: a required column that is missing, texts that were
    rendered with a chat template already. structured: columns whose texts are JSON, whatever they look like.
    """

    def __init__(
        self,
        where: str,
        head: Sequence[dict[str, Any]],
        required: Sequence[str],
        optional: Sequence[str],
        structured: Sequence[str] = (),
    ) -> None:
        self._structured = structured
        self.columns = list(dict.fromkeys(column for row in head for column in row))
        for column in required:
            if column not in self.columns:
                raise missing_column(where, column, self.columns)
        self._wanted = [*required, *(column for column in optional if column not in required)]
        self._said: set[str] = set()
        self.notes: list[str] = []
        self._readers = {column: self._reader(where, column, head) for column in self._wanted}

    def row(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The wanted cells of a row, plain (`stages.cells.plain`), conversations as messages; None where there is none."""
        return {column: self._cell(column, raw.get(column)) for column in self._wanted}

    def _cell(self, column: str, value: Any) -> Any:
        try:
            value = plain(value)
            reader = self._readers[column]
            if reader is not None and isinstance(value, str):
                value = plain(reader(value))
            if isinstance(value, list) and value and all(isinstance(inner, list) for inner in value):
                return [conversation(inner, lambda note: self._say(column, note)) for inner in value]
            return conversation(value, lambda note: self._say(column, note))
        except BadRow as bad:
            return Unreadable(bad.reason, bad.detail)
        except RecursionError:
            return Unreadable("not_text", "nested too deep")

    def _say(self, column: str, note: str) -> None:
        said = f"column {column}: {note}"
        if said not in self._said:
            self._said.add(said)
            self.notes.append(said)

    def _reader(self, where: str, column: str, head: Sequence[dict[str, Any]]) -> Callable[[str], Any] | None:
        """What makes messages of the column's texts, if half of them at least are not just text."""
        cells = [row.get(column) for row in head]
        shown = [cell.decode("utf-8", "replace") if isinstance(cell, bytes) else cell for cell in cells]
        texts: list[str] = [text for text in shown if isinstance(text, str) and text.strip()]

        def most(looks: Callable[[str], bool]) -> bool:
            return bool(texts) and 2 * sum(map(looks, texts)) >= len(texts)

        if column in self._structured:
            return lambda text: written(text, lambda note: self._say(column, note.replace("messages", "lists")))
        if most(looks_written):
            return lambda text: written(text, lambda note: self._say(column, note)) if looks_written(text) else text
        if most(looks_spoken):
            self._say(column, "dialogues written as one text (Human: ... Assistant: ...) read as messages")
            return lambda text: dialogue(text) if looks_spoken(text) else text
        if most(looks_rendered):
            raise UserError(
                f"column {column!r} holds conversations that a chat template has rendered already, for example {texts[0].strip()[:60]!r}",
                where=where,
                fix="Give plain texts or lists of messages: the model's own template is put around them here.",
            )
        return None


def missing_column(where: str, column: str, columns: Sequence[str]) -> UserError:
    """The error of a column that is not there: it names those that are, and the likeliest of them."""
    nearest = get_close_matches(column, columns, n=1, cutoff=0.5)
    nearest += [name for name in _OTHER_NAMES.get(column, ()) if name in columns]
    nearest = nearest or get_close_matches(column, columns, n=1, cutoff=0.4)
    hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
    shown = ", ".join(repr(name)[:80] for name in columns[:40]) + (", ..." if len(columns) > 40 else "")
    return UserError(
        f"there is no column {column!r}; the columns are {shown or 'none'}",
        where=where,
        fix=f"{hint}Set the source's `fields` to the names of your columns.",
    )
