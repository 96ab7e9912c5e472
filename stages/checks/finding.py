"""What a check found. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

State = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of `doctor`. check: stable name; what: what was found; fix: what to do; values: the figures behind it."""

    check: str
    state: State
    what: str
    fix: str = ""
    values: dict[str, float | str] = field(default_factory=dict)
