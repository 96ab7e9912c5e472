"""How a file lays its rows out: which columns it has, and in what form its texts are, decided once from its first rows.

What was read as what is said once a file (`notes`), never guessed in silence; a column that is missing is an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from schemas.errors import UserError
from schemas.languages import standard
from stages.beside import other_pairs
from stages.cells import Unreadable, plain
from stages.text.dialogue import dialogue, looks_spoken
from stages.text.forms import conversation, written_conversation
from stages.text.messages import BadRow
from stages.text.unread import last_name, looks_noted, looks_rendered, looks_turned, outer_names
from stages.text.written import boxed_key, printed_bytes, quoted_text, written_lists, written_texts

LOOKED_AT = 1000
"""Rows that decide a file's layout."""
HALF = 0.5
"""Share of a column's texts, at least, that have the form the column is read in."""

_OTHER_NAMES = {
    "prompt": ("question", "instruction", "input", "query", "problem", "user", "text", "messages", "conversations"),
    "chosen": ("preferred", "accepted", "winner", "positive", "better", "response_chosen"),
    "rejected": ("dispreferred", "loser", "negative", "worse", "response_rejected"),
    "messages": ("conversations", "conversation", "dialogue", "dialog", "chat", "turns"),
    "completion": ("response", "answer", "output", "completions", "target"),
    "language": ("lang", "locale", "language_code", "lang_code"),
    "group_id": ("group", "id", "translation_id", "task_id"),
    "system": ("system_prompt", "instruction"),
}

_OTHERS = frozenset(("system", "sys", "meta", "negative", "template"))
"""Words of a column that is another one than what it otherwise names: system_prompt."""
_ABOUT = frozenset(
    (
        "id",
        "ids",
        "index",
        "idx",
        "hash",
        "len",
        "length",
        "tokens",
        "score",
        "rating",
        "rank",
        "model",
        "source",
        "language",
        "lang",
    )
)
"""Words of a column that is about another one."""
_ALIKE = 0.75
"""Likeness of two names, at least, of which one may be a slip for the other."""
_IN_OTHERS = 0.05
"""Share of the rows that lack a column, at least, that is no accident where all of them have another in its place."""


class Layout:
    """The layout of one file.

    notes: what was read as what, not said yet. Raises UserError: a required column that is missing, texts that were
    rendered with a chat template already, conversations written in a way that is not read. structured: columns whose texts
    are lists, whatever they look like, and never messages themselves -> the key of the text in each of their objects (None: they hold no
    texts). lists: columns whose texts may be lists of texts -> the
    column beside it whose texts then are none. singles: columns of one text a row, each in a list of its own where the first
    of them, what is asked, has such lists.
    """

    def __init__(
        self,
        where: str,
        head: Sequence[dict[str, Any]],
        required: Sequence[str],
        optional: Sequence[str],
        structured: Mapping[str, str | None] | None = None,
        lists: Mapping[str, str] | None = None,
        singles: Sequence[str] = (),
    ) -> None:
        self._structured, self._lists = structured or {}, lists or {}
        answers = {*self._lists, *self._lists.values()}
        self._one = [column for column in singles if column not in answers]
        self._asked = singles[:1]
        self._singles = singles if singles and _mostly_lists(_texts([row.get(singles[0]) for row in head])) else ()
        self.columns = list(dict.fromkeys(column for row in head for column in row))
        for column in required:
            if column not in self.columns:
                raise missing_column(where, column, self.columns)
        self._wanted = [*required, *(column for column in optional if column not in required)]
        self._said: set[str] = set()
        self._rows = 0
        self._odd: dict[str, Counter[str]] = {}
        self._first_odd: dict[str, int] = {}
        self.notes: list[str] = []
        self._note_lacking(head, required)
        self._readers = {column: self._reader(where, column, head) for column in self._wanted}
        self._answers = {
            f"{column}.{key}": self._reader_of(where, f"{column}.{key}", _answers_in(column, key, head), head)
            for column, key in self._structured.items()
            if key is not None
        }

    def row(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The wanted cells of a row, plain (`stages.cells.plain`), conversations as messages; None where there is none."""
        self._rows += 1
        return {column: self._cell(column, raw.get(column)) for column in self._wanted}

    def finish(self) -> None:
        """Note, once all rows were read, which texts were taken as text and look like something else."""
        found = [
            f"column {column}: {', '.join(f'{count:,} {form}' for form, count in counts.items())} (first in row {self._first_odd[column]:,})"
            for column, counts in self._odd.items()
        ]
        if found:
            self.notes.append(f"taken as text, whatever they look like: {'; '.join(found)}")

    def _note_lacking(self, head: Sequence[dict[str, Any]], required: Sequence[str]) -> None:
        """Note columns that many rows do not have (not even empty), and have another in their place: files that were joined."""
        for column in self._wanted:
            lacking = [row for row in head if column not in row]
            if not _IN_OTHERS * len(head) <= len(lacking) < len(head):
                continue
            having = {name for row in head if column in row for name in row}
            instead = [name for name in lacking[0] if name not in having and all(name in row for row in lacking)]
            named = [name for name in _OTHER_NAMES.get(column, ()) if name in instead]
            if found := named or (instead if column in required else []):
                self._say(
                    column,
                    f"{len(lacking):,} of the first {len(head):,} rows do not have it, and have {found[0][:80]!r}, which is not read:"
                    " give rows of each kind in a file of their own, with `fields`",
                )

    def _cell(self, column: str, value: Any) -> Any:
        if column not in self._structured:
            return self._read(column, self._readers[column], value, column in self._one)
        reader, key = self._readers[column], self._structured[column]
        try:
            value = plain(value)
            if reader is not None and isinstance(value, str):
                value = plain(reader(value))
        except RecursionError:
            return Unreadable("not_text", "nested too deep")
        if key is None:
            return value
        name = f"{column}.{key}"
        return each_answer(value, key, lambda answer: self._read(name, self._answers[name], answer, True))

    def _read(self, column: str, reader: Callable[[str], Any] | None, value: Any, one: bool) -> Any:
        """What a cell says: messages, where it is a conversation in a form that is known. one: a list of one text is that text."""
        try:
            value = plain(value)
            if one and (only := _only(value)) is not None and written_conversation(only, _silent) is None:
                self._say(column, "a list of one text read as that text")
                value = only
            if reader is not None and isinstance(value, str):
                value = plain(reader(value))
            if isinstance(value, list) and value and all(isinstance(inner, str) for inner in value):
                value = self._messages(column, value)
            if isinstance(value, list) and value and all(isinstance(inner, list) for inner in value):
                value = [conversation(inner, lambda note: self._say(column, note)) for inner in value]
            else:
                value = conversation(value, lambda note: self._say(column, note))
        except BadRow as bad:
            return Unreadable(bad.reason, bad.detail)
        except RecursionError:
            return Unreadable("not_text", "nested too deep")
        for text in _texts_of(value):
            self._look(column, text)
        return value

    def _look(self, column: str, text: str) -> None:
        """Count a text of a column, or of a message in it, by what else it looks like."""
        if (form := _form(text)) is not None:
            self._odd.setdefault(column, Counter())[form] += 1
            self._first_odd.setdefault(column, self._rows)

    def _messages(self, column: str, texts: list[str]) -> list[Any]:
        """A list of texts, or of what they are if each is a message written as JSON."""
        found: list[Any] = []
        for text in texts:
            value = written_conversation(text, _silent)
            if value is None or isinstance(value, Unreadable):
                return texts
            found.append(value)
        self._say(column, "JSON texts in a list read as messages")
        return found

    def _say(self, column: str, note: str) -> None:
        said = f"column {column}: {note}"
        if said not in self._said:
            self._said.add(said)
            self.notes.append(said)

    def _reader(self, where: str, column: str, head: Sequence[dict[str, Any]]) -> Callable[[str], Any] | None:
        """What makes messages of the column's texts, if half of them at least are not just text; lists of those of a structured one."""
        if column in self._structured:
            return lambda text: written_lists(text, lambda note: self._say(column, note))
        return self._reader_of(where, column, [row.get(column) for row in head], head)

    def _reader_of(
        self, where: str, column: str, cells: Sequence[Any], head: Sequence[dict[str, Any]]
    ) -> Callable[[str], Any] | None:
        """What makes messages of the texts in these cells. head: the rows that they are from."""
        texts = _texts(cells, column in self._one or column not in self._wanted)

        def tell(note: str) -> None:
            self._say(column, note)

        _refuse_rendered(where, column, cells)
        forms = Counter(map(_form, texts))
        shares = {form: forms[form] / max(1, len(texts)) for form in _FORMS}
        if shares[_WRITTEN] >= HALF:
            return lambda text: text if (value := written_conversation(text, tell)) is None else value
        for form, of_all in shares.items():
            if 0 < of_all < HALF:
                self._say(column, f"{of_all:.1%} of the texts are {form}, and are taken as text")
        for form, (what, fix) in _REFUSED.items():
            if shares[form] >= HALF:
                example = _ends(next(text for text in texts if _form(text) == form))
                raise UserError(f"column {column!r} holds {what}, for example {example!r}", where=where, fix=fix)
        several = next((name for name, chosen in self._lists.items() if chosen == column), None)
        if several and _one_against_several(texts, _texts([row.get(several) for row in head])):
            self._say(column, "lists of one text read as that text")
            return lambda text: text if (value := written_texts(text, _silent)) is None else value
        if column in self._singles:
            self._say(
                column, f"lists of texts, as {self._singles[0]} has them: a list of one text is read as that text"
            )
            return _single
        if column in self._lists and _mostly_lists(texts):
            beside = _texts([row.get(self._lists[column]) for row in head])
            if _one_against_several(beside, texts) or not (
                _mostly_lists(beside) or _share(beside, _is_structure) >= HALF
            ):
                return lambda text: text if (value := written_texts(text, tell)) is None else value
            self._say(column, f"lists of texts, as {self._lists[column]} has them too, are taken as text")
        elif self._singles and column not in self._lists.values() and _mostly_lists(texts):
            self._say(column, f"a list of one text is read as that text, as {self._singles[0]} is")
            return lambda text: found if isinstance(found := _single(text), str) else text
        if shares[_SPOKEN] >= HALF:
            self._say(column, "dialogues written as one text (Human: ... Assistant: ...) read as messages")
            return lambda text: dialogue(text) if looks_spoken(text) else text
        return self._literal(where, column, texts)

    def _literal(self, where: str, column: str, texts: Sequence[str]) -> Callable[[str], Any] | None:
        """What makes texts of a column's texts that are written as a program writes them. Quotation marks around all of
        them are a program's where one holds an escaped quotation mark or line break; people put them around texts too."""
        if _share(texts, lambda text: printed_bytes(text) is not None) >= HALF:
            self._say(column, "bytes as Python prints them read as text")
            return lambda text: text if (value := printed_bytes(text)) is None else value
        quoted = [value for value in map(quoted_text, texts) if value is not None]
        if texts and len(quoted) == len(texts) and any(set(value) & set('"\n') for value in quoted):
            self._say(column, "texts in quotation marks read as JSON texts")
            return lambda text: text if (value := quoted_text(text)) is None else value
        boxed, named = (Counter(filter(None, map(of, texts))) for of in (boxed_key, outer_names))
        key, boxes = next(iter(boxed.most_common(1)), ("", 0))
        if boxes >= HALF * max(1, len(texts)) and (key == column or (column in self._asked and key in _BOXES)):
            raise UserError(
                f"column {column!r} holds objects with a text, for example {_ends(next(filter(boxed_key, texts)))!r}",
                where=where,
                fix=f"Write what is under the key {key!r} into the column itself.",
            )
        found = {
            "in quotation marks": len(quoted),
            f"objects with one text, under the key {key[:40]!r}": boxes,
            **{f"begun by '{one}:' and ended by '{other}:'": count for (one, other), count in named.most_common(1)},
        }
        if not named:
            found |= {
                f"ended by {name!r}": count
                for name, count in Counter(filter(None, map(last_name, texts))).most_common(1)
            }
        for what, count in found.items():
            if count >= HALF * max(1, len(texts)):
                self._say(column, f"{count / len(texts):.1%} of the texts are {what}, and are taken as text")
        return None


def _ends(text: str) -> str:
    text = text.strip()
    return text if len(text) <= 80 else f"{text[:50]} ... {text[-25:]}"


def each_answer(value: Any, key: str, of: Callable[[Any], Any]) -> Any:
    """Answers in a cell (objects with a text under `key`, a dict of lists side by side, or texts) with `of` what each says in its place."""
    if isinstance(value, dict) and isinstance(said := value.get(key), list):
        return value | {key: [of(one) for one in said]}
    if not isinstance(value, list):
        return value
    return [(one | {key: of(one[key])} if key in one else one) if isinstance(one, dict) else of(one) for one in value]


def _answers_in(column: str, key: str, head: Sequence[dict[str, Any]]) -> list[Any]:
    found: list[Any] = []
    for cell in (row.get(column) for row in head):
        try:
            each_answer(plain(written_lists(cell, _silent) if isinstance(cell, str) else cell), key, found.append)
        except RecursionError:
            continue  # said of its row
    return found


def _texts_of(value: Any) -> Iterator[str]:
    """A text, or those of messages, of several texts and of several conversations."""
    if isinstance(value, str):
        yield value
    for inner in value if isinstance(value, list) else ():
        yield from _texts_of(inner.get("content") if isinstance(inner, dict) else inner)


def _refuse_rendered(where: str, column: str, cells: Sequence[Any]) -> None:
    """Raise UserError where half of the cells hold what a chat template has rendered, in a text or in a message."""
    found = [list(_texts_of(_as_read(cell))) for cell in cells]
    rendered = [text for texts in found if (text := next(filter(looks_rendered, texts), None)) is not None]
    if rendered and len(rendered) >= HALF * sum(map(bool, found)):
        raise UserError(
            f"column {column!r} holds texts that a chat template has rendered already, for example {_ends(rendered[0])!r}",
            where=where,
            fix="Give plain texts or lists of messages: the model's own template is put around them here.",
        )


def _as_read(cell: Any) -> Any:
    """A cell as it is read if it is a conversation, else as it is; None where it cannot be."""
    try:
        value = plain(cell)
        if isinstance(value, str):
            written = written_conversation(value, _silent)
            value = written if written is not None else dialogue(value) if looks_spoken(value) else value
        return conversation(value, _silent)
    except (BadRow, RecursionError):
        return None


def _texts(cells: Sequence[Any], one: bool = False) -> list[str]:
    """The texts among cells; one: those in lists of one too."""
    shown = [cell.decode("utf-8", "replace") if isinstance(cell, bytes) else cell for cell in cells]
    found = [_only(cell) or cell for cell in shown] if one else shown
    return [text for text in found if isinstance(text, str) and text.strip()]


def _only(cell: Any) -> str | None:
    """The text of a list of one."""
    return cell[0] if isinstance(cell, list) and len(cell) == 1 and isinstance(cell[0], str) else None


def _share(texts: Sequence[str], looks: Callable[[str], bool]) -> float:
    return sum(map(looks, texts)) / max(1, len(texts))


def _mostly_lists(texts: Sequence[str]) -> bool:
    """Whether at least half of the texts are lists of texts."""
    return _share(texts, lambda text: written_texts(text, _silent) is not None) >= HALF


def _is_structure(text: str) -> bool:
    """Whether a text is a list or an object."""
    return text.lstrip()[:1] in ("[", "{") and not isinstance(written_lists(text, _silent), Unreadable)


def _one_against_several(chosen: Sequence[str], rejected: Sequence[str]) -> bool:
    """Whether texts are lists of the one answer, and those beside them of several that are worse."""
    lengths = [[len(written_texts(text, _silent) or ()) for text in side] for side in (chosen, rejected)]
    return all(
        sum(fits) >= HALF * max(1, len(fits))
        for fits in ([length == 1 for length in lengths[0]], [length > 1 for length in lengths[1]])
    )


def _single(text: str) -> Any:
    """The one text of a list that is written as a text; a longer list as it is, and so is any other text."""
    texts = written_texts(text, _silent)
    return text if texts is None else texts[0] if len(texts) == 1 else texts


def _silent(note: str) -> None:
    """Says nothing."""


_WRITTEN, _SPOKEN, _RENDERED, _NOTED, _TURNED = (
    "messages written as JSON",
    "dialogues written as one text (Human: ... Assistant: ...)",
    "rendered by a chat template",
    "messages in a notation that is not read",
    "dialogues whose turns are named or marked in a way that is not read",
)
_FORMS: dict[str, Callable[[str], bool]] = {
    _WRITTEN: lambda text: written_conversation(text, _silent) is not None,
    _SPOKEN: looks_spoken,
    _RENDERED: looks_rendered,
    _NOTED: looks_noted,
    _TURNED: looks_turned,
}
"""What texts may be instead of plain text -> whether one looks like it."""
_REFUSED = {
    _NOTED: (_NOTED, "Write each as JSON: a list of {role, content}."),
    _TURNED: (_TURNED, "Name the turns 'Human:' and 'Assistant:', or write each as JSON: a list of {role, content}."),
}
"""Forms that half of a column may not have -> what it then holds, and what to do."""
_BOXES = ("text", "content", "value", "message", "prompt", "question", "instruction", "input", "query")
"""Keys of an object that holds nothing but what is asked."""


def _form(text: str) -> str | None:
    """What a text looks like, the first of `_FORMS`; None: text."""
    return next((form for form, looks in _FORMS.items() if looks(text)), None)


def missing_column(where: str, column: str, columns: Sequence[str]) -> UserError:
    """The error of a column that is not there: it names those that are, and the likeliest of them."""
    nearest = get_close_matches(column, [name for name in columns if not _is_about(name, column)], n=1, cutoff=_ALIKE)
    form = other_pairs(columns) if column in ("chosen", "rejected") and not nearest else None
    if form is not None:
        return _missing(where, column, columns, form)
    parts = [name for name in columns if _parts(name) >= _parts(column) and not _is_about(name, column)]
    others = [name for name in _OTHER_NAMES.get(column, ()) if name in columns]
    nearest += [name for name in parts if not _parts(name) & _OTHERS] + others
    hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
    if len(columns) == 1 and column in columns[0]:
        hint = "Is `delimiter` right? There is one column only. "
    spoken = [name for name in columns if name.casefold() != "id" and standard(name) is not None]
    fix = f"{hint}Set the source's `fields` to the names of your columns."
    if not nearest and len(spoken) > 1 and 2 * len(spoken) >= len(columns):  # a column a language, as translations come
        name = spoken[0]
        fix = (
            f"These columns look like languages: give the source once for each, {{path: …, language: {name}, "
            f"fields: {{{column}: {name}}}}}."
        )
    return _missing(where, column, columns, fix)


def _missing(where: str, column: str, columns: Sequence[str], fix: str) -> UserError:
    shown = ", ".join(repr(name)[:80] for name in columns[:40]) + (", ..." if len(columns) > 40 else "")
    return UserError(
        f"there is no column {column!r}; the columns are {shown or 'none'}",
        where=where,
        fix=fix,
    )


def _parts(name: str) -> set[str]:
    return set(re.split(r"[\W_]+", name.lower()))


def _is_about(name: str, column: str) -> bool:
    """Whether a column says something about another one of the name `column`: prompt_id, chosen_score."""
    return bool((_parts(name) - _parts(column)) & _ABOUT)
