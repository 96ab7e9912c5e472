"""The command `congrad` (also `python -m congrad`): finds this project's own packages first, wherever it is started.

`pipeline`, `stages`, `schemas` and `data` are common names. A working folder, or a PYTHONPATH, that holds a `data.py` or a `schemas/`
would otherwise be imported in their place.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path

_PACKAGES = ("pipeline", "stages", "schemas", "data")
_ROOT = Path(__file__).resolve().parents[1]


def settle_imports() -> str:
    """Leave the working folder out of the import path, unless the project lies there. Returns what is still in the way, or ""."""
    here = os.path.realpath(os.curdir)
    if here != str(_ROOT):
        sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or os.curdir) != here]
    for name in _PACKAGES:
        loaded = sys.modules.get(name)
        spec = loaded.__spec__ if loaded is not None else find_spec(name)
        place = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if place != _ROOT / name / "__init__.py":
            where = place or (
                next(iter(spec.submodule_search_locations or []), "nowhere") if spec is not None else "nowhere"
            )
            return (
                f"Another package named {name!r} hides this project's ({where}, not {_ROOT / name}). Install the project in an "
                "environment of its own, or take that folder out of PYTHONPATH."
            )
    return ""


def main() -> None:
    """Entry point of the command line."""
    if problem := settle_imports():
        sys.exit(problem.encode("ascii", "backslashreplace").decode())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # not every locale has the characters of every language
            stream.reconfigure(errors="backslashreplace")
    from pipeline.cli import app

    app()
