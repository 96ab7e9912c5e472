"""Where the shipped files are, and paths as people write them: `~` and `$VARIABLES`."""

from __future__ import annotations

import os
import re
from pathlib import Path

from schemas.errors import UserError

DATA = Path(__file__).resolve().parents[1] / "data"
"""Files shipped with the package, wherever it is installed."""
_VARIABLE = re.compile(r"\$(?:\w+|\{\w+\})")


def refuse_undecodable(path: Path | str, where: str) -> None:
    """Raise UserError for a path whose bytes are no text: neither JSON nor Polars takes it."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"The name of this file or folder is no UTF-8: {str(path)!a}",
            where=where,
            fix="Rename it. (In a locale such as C every name with other letters than ASCII is none: LC_ALL=C.UTF-8.)",
        ) from None


def expanded(text: str) -> str:
    """`text` with `~`, `~user`, `$NAME` and `${NAME}` filled in. Raises ValueError for a variable that is not set, a user without a home,
    and a NUL character. Names that are no path (hub ids, `package:…`, `embedded:…`) hold none of these and stay."""
    if "\0" in text:
        raise ValueError("it holds a NUL character, which no path can")
    found = os.path.expanduser(os.path.expandvars(text)) if text.startswith("~") or "$" in text else text
    if missing := _VARIABLE.search(found):
        raise ValueError(f"the environment variable {missing[0]} is not set")
    if found.startswith("~"):
        raise ValueError(f"there is no home folder for {found.split('/')[0]!r}")
    return found
