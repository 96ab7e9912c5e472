"""Where the shipped files are, and paths as people write them: `~` and `$VARIABLES`."""

from __future__ import annotations

import os
import re
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / "data"
"""Files shipped with the package, wherever it is installed."""
_VARIABLE = re.compile(r"\$(?:\w+|\{\w+\})")


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
