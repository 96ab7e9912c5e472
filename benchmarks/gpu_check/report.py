"""What a check found, as rows of a table and of a JSON file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["right", "wrong", "met", "missed", "measured", "not run"]


@dataclass(frozen=True)
class Row:
    """One figure. bound: what it must or should not exceed (or, at least, reach), in words. note: beside it."""

    part: str
    what: str
    value: str
    bound: str
    verdict: Verdict
    note: str = ""


@dataclass(frozen=True)
class Sizes:
    """How much is computed. device: cuda or cpu."""

    device: str
    layers: int
    hidden: int
    model_hidden: int
    model_layers: int
    vocabulary: int
    pairs: int
    tokens: int
    matrix: int
    copy_bytes: int
    repeats: int
    small: bool

    @classmethod
    def of(cls, device: str, small: bool) -> Sizes:
        """small: seconds on two cores, to see that everything runs."""
        if small:
            return cls(device, 1, 56, 64, 2, 512, 4, 24, 256, 1 << 22, 1, True)
        return cls(device, 4, 2048, 2048, 16, 65_536, 32, 512, 8192, 1 << 30, 5, False)


def against(sizes: Sizes, good: bool) -> Verdict:
    """Of an aim; small sizes say nothing about it."""
    if sizes.small:
        return "measured"
    return "met" if good else "missed"


def right(part: str, what: str, found: float, most: float, note: str = "") -> Row:
    """A difference that must not exceed `most`; not a number is wrong too."""
    return Row(part, what, f"{found:.2e}", f"<= {most:g}", "right" if found <= most else "wrong", note)


def exactly(part: str, what: str, same: bool, note: str = "") -> Row:
    """Something that must be equal to the bit."""
    return Row(part, what, "equal" if same else "different", "equal", "right" if same else "wrong", note)


def table(rows: list[Row]) -> str:
    """As Markdown."""
    lines = ["| part | what | value | bound | verdict | note |", "| --- | --- | ---: | ---: | --- | --- |"]
    lines += [f"| {r.part} | {r.what} | {r.value} | {r.bound} | {r.verdict} | {r.note} |" for r in rows]
    return "\n".join(lines)


def as_json(facts: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    """The machine's facts and all rows."""
    return {**facts, "rows": [asdict(row) for row in rows]}
