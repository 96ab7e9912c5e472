"""The one error a user is meant to see: what is wrong, where, what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from schemas.secrets import without_secrets

_LONGEST = 1500  # characters of each part


class UserError(Exception):
    """A problem the user can fix. Printed as one paragraph, without a traceback.

    what: what is wrong.  where: file, line, config key or table.  fix: what to do about it.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = _cut(what), _cut(where), _cut(fix)
        super().__init__(str(self))

    def __str__(self) -> str:
        where = f" ({self.where})" if self.where else ""
        fix = f" {self.fix}" if self.fix else ""
        end = "" if not where and self.what.endswith("?") else "."
        return f"{self.what.rstrip('.')}{where}{end}{fix}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.fix)


@contextmanager
def foreign(problem: Callable[[Exception], UserError]) -> Iterator[None]:
    """A library reads files of others: whatever it raises over them is the user's error, in the words of `problem`. Of any kind, since
    libraries raise any: tokenizers a bare Exception, transformers IndexError, AssertionError and its validators' own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise problem(error) from error


def first_line(error: BaseException) -> str:
    """What an error of a library says first, less credentials; its kind, if it says nothing. Of pydantic's the first thing that it found."""
    said = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else str(error)
    return without_secrets((said.strip().splitlines() or [type(error).__name__])[0])


def last_line(error: BaseException) -> str:
    """What an error says last, as one that quotes a traceback does; else as `first_line`."""
    return without_secrets((str(error).strip().splitlines() or [type(error).__name__])[-1].strip())


def _cut(text: str) -> str:
    """Errors quote what users and models wrote, which may be a megabyte, and addresses with passwords."""
    text = without_secrets(text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _rebuild(kind: type[UserError], what: str, where: str, fix: str) -> UserError:
    return kind(what, where=where, fix=fix)
