"""Values that are written as a text: as JSON, as Python or numpy prints them, and near enough to either."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from stages.cells import Unreadable

Tell = Callable[[str], None]
"""Is told what was read as what."""

UNSEEN = "\ufeff\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069"
_BEFORE = re.compile(rf"[\s{UNSEEN}]*")
"""What may stand before a text and is none of it: space, a byte order mark, marks of direction."""
_TEXTS = re.compile(r"\s*(?:array\()?\[")
_ESCAPED = re.compile(r'[\[{][\s\[{]*\\"')
_COMMA = re.compile(r'(?P<value>"(?:\\.|[^"\\])*(?:"|\\?\Z))|,(?=\s*[\]}])', re.DOTALL)
"""Texts, and commas that nothing follows."""
_HALVES = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_LONGEST_PYTHON = 1_000_000
_PRINTED = re.compile(
    r"""(?P<value>'(?:\\.|[^'\\])*(?:'|\\?\Z)|"(?:\\.|[^"\\])*(?:"|\\?\Z)|\d[\w.+-]*|(?P<missing>\bnan\b|-?\binf\b|\bNone\b|<NA>))"""
    r"""(?P<next>\s+(?=['"<\d.+-]|nan\b|inf\b|None\b))?|(?P<end>[}\])])\s+(?=[{\[(]|array\()"""
    r"""|(?P<array>\b(?:array|(?:np|numpy)\.\w+)\()|(?P<kind>,\s*dtype=\w+(?=\)))""",
    re.DOTALL,
)
"""Values, also a text that does not end (or every quote in it would be tried as a beginning), and what numpy puts around and between them."""


def written_texts(text: str, tell: Tell) -> list[str | None] | None:
    """The texts of a list of texts that a text is, as JSON, Python or numpy writes it; None for any other text."""
    text = bare(text)
    if not _TEXTS.match(text):
        return None
    value, how = parsed(text)
    if not isinstance(value, list) or not value or not all(isinstance(answer, str | None) for answer in value):
        return None
    tell(f"{how} read as a list of texts")
    return value


def written_lists(text: str, tell: Tell) -> Any:
    """The list or dict that a text is, as JSON, Python or numpy writes it; Unreadable for any other text."""
    value, how = parsed(text)
    if how is None:
        return Unreadable("not_text", "a text that cannot be parsed as a list")
    if repeats(value):
        return Unreadable("not_text", TWICE)
    tell(f"{how} read as lists")
    return value


def quoted_text(text: str) -> str | None:
    """The text that a text is, as JSON writes one; None for any other text."""
    if text[:1] != '"' or text[-1:] != '"' or len(text) < 2:
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def printed_bytes(text: str) -> str | None:
    """The text in bytes that Python printed (b'...'); None for any other text."""
    if text[:2] not in ("b'", 'b"') or text[-1:] != text[1] or not 3 <= len(text) <= _LONGEST_PYTHON:
        return None
    try:
        value = ast.literal_eval(text)
        return value.decode("utf-8") if isinstance(value, bytes) else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def boxed_key(text: str) -> str | None:
    """The key of an object of one text that a text is, as JSON or Python writes it; None for any other text."""
    value = parsed(text)[0] if text[:1] == "{" and text[-1:] == "}" else None
    if not isinstance(value, dict) or len(value) != 1:
        return None
    key, inner = next(iter(value.items()))
    return key if isinstance(key, str) and isinstance(inner, str) else None


def bare(text: str) -> str:
    """The text without what stands before it unseen."""
    return text[found.end() :] if (found := _BEFORE.match(text)) else text


def parsed(text: str) -> tuple[Any, str | None]:
    """(value, how it is written); (None, None) for what is neither JSON nor Python nor numpy's print of an array."""
    text = bare(text).rstrip()
    for read, how in _NOTATIONS:
        try:
            return read(text), how
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):  # TypeError: a set of sets
            continue
    return None, None


class _Repeated(dict[str, Any]):
    """An object that has a key twice: which of the two is meant cannot be known."""


TWICE = "a key is there twice in one object of a text that holds JSON"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Repeated(found)


def repeats(value: Any) -> bool:
    """Whether an object in a value has a key twice."""
    return any(isinstance(one, _Repeated) for one in inside(value))


def inside(value: Any) -> Iterator[Any]:
    """A value and all that lists and dicts in it hold, however deep."""
    rest = [value]
    while rest:
        yield (one := rest.pop())
        rest.extend(one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())


def _json(text: str) -> Any:
    """JSON, also with line breaks and tabs inside its texts."""
    return json.loads(text, strict=False, object_pairs_hook=_object)


def _json_with_commas(text: str) -> Any:
    """JSON with commas after the last element."""
    without = _COMMA.sub(lambda found: found["value"] or "", text)
    if without == text:
        raise ValueError
    return _json(without)


def _json_lines(text: str) -> list[Any]:
    """Objects, one a line."""
    if text[:1] != "{" or "\n" not in text:
        raise ValueError
    values = [_json(line) for line in text.split("\n") if line.strip()]
    if not all(isinstance(value, dict) for value in values):
        raise ValueError
    return values


def _json_escaped(text: str) -> Any:
    """JSON as it stands inside the quotes of a JSON text."""
    if not _ESCAPED.match(text):
        raise ValueError
    return _json(json.loads(f'"{text}"', strict=False))


def _python(text: str) -> Any:
    """What Python prints, or numpy. Raises ValueError for a key that a dict has twice."""
    if len(text) > _LONGEST_PYTHON:
        raise ValueError
    tree = ast.parse(_PRINTED.sub(_as_python, text), mode="eval")
    for node in ast.walk(tree):
        keys = [key.value for key in node.keys if isinstance(key, ast.Constant)] if isinstance(node, ast.Dict) else []
        if len(set(keys)) != len(keys):
            raise ValueError
    return _paired(ast.literal_eval(tree))


_NOTATIONS: tuple[tuple[Callable[[str], Any], str], ...] = (
    (_json, "JSON text"),
    (_json_with_commas, "JSON text"),
    (_json_lines, "JSON objects, one a line,"),
    (_json_escaped, "escaped JSON text"),
    (_python, "text as Python prints it"),
)


def _paired(value: Any) -> Any:
    """A value with the two halves of a character that JSON escapes as one character, inside lists and dicts too."""
    if isinstance(value, str):
        whole = value.isascii() or not _HALVES.search(value)
        return value if whole else value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    if isinstance(value, dict):
        return {_paired(key): _paired(inner) for key, inner in value.items()}
    return type(value)(map(_paired, value)) if isinstance(value, list | tuple) else value


def _as_python(found: re.Match[str]) -> str:
    """A piece of what numpy prints, as Python has it: commas between elements, no word array, None for nan. Texts stay as they are."""
    if found["value"] is not None:
        return ("None" if found["missing"] else found["value"]) + ("," if found["next"] else "")
    return found["end"] + "," if found["end"] else "(" if found["array"] else ""
