"""A table in the forms that papers print: Markdown, LaTeX for booktabs, and CSV."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import polars as pl

from stages.evaluate.metrics import CONTROLLED, WIN_RATES
from stages.text.markdown import escape

_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


@dataclass(frozen=True)
class PaperTable:
    """Methods down, (group, title) across; cells: text, and whether it is printed bold."""

    columns: list[tuple[str, str]]
    rows: list[tuple[str, list[tuple[str, bool]]]]


_BETTER = ("accuracy", "implicit_reward_accuracy", *WIN_RATES, "answer_language", "logp_chosen", "benchmarks")
_BETTER_OF_TASKS = ("acc", "acc_norm", "exact_match", "f1", "bleu", "chrf")
"""Metrics, of tasks those of the harness, of which more is better, their changes and figures at equal length too: of others nothing is printed bold."""
BOLD = "Bold, where more is better: its interval lies above that of every other"


def is_above(row: dict[str, Any], rivals: list[dict[str, Any]]) -> bool:
    """Whether more is better of the row's metric and all there is to compare with lies below, intervals included; one seed has none, and shows
    nothing."""
    if not _more_is_better(row["metric"]):
        return False
    return bool(rivals) and all(
        row["low"] is not None and other["high"] is not None and row["low"] > other["high"] for other in rivals
    )


def _more_is_better(metric: str) -> bool:
    task, _, name = metric.removesuffix("_change").removesuffix(CONTROLLED).rpartition("/")
    return name.partition(" (")[0] in _BETTER_OF_TASKS if task else name in _BETTER


def as_csv(figures: pl.DataFrame) -> str:
    """CSV in which no text is a formula to a spreadsheet: one that begins as such gets an apostrophe, as OWASP advises."""
    return figures.with_columns(pl.col(pl.String).str.replace(r"^([=+\-@\t\r])", "'${1}")).write_csv()


def markdown(table: PaperTable) -> str:
    """A pipe table."""
    head = ["", *(escape(f"{group}: {title}") for group, title in table.columns)]
    lines = [head, ["---"] * len(head)]
    lines += [[escape(arm), *(f"**{text}**" if best else text for text, best in cells)] for arm, cells in table.rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def latex(table: PaperTable) -> str:
    """A tabular for booktabs."""
    lines = [r"\begin{tabular}{l" + "c" * len(table.columns) + "}", r"\toprule"]
    lines += [_row(["", *(_tex(f"{group}: {title}") for group, title in table.columns)]), r"\midrule"]
    for arm, cells in table.rows:
        texts = (_tex(text).replace("±", r"$\pm$").replace("–", "--") for text, _ in cells)
        lines.append(
            _row([_tex(arm), *(rf"\textbf{{{t}}}" if b else t for t, (_, b) in zip(texts, cells, strict=True))])
        )
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _row(cells: list[str]) -> str:
    row = " & ".join(cells)
    return ("{}" if row.startswith(("[", "*")) else "") + row + r" \\"  # else an argument of the command before it


def _tex(text: str) -> str:
    return "".join(_escaped(text))


def _escaped(text: str) -> Iterator[str]:
    for character in " ".join(text.split()):
        yield _LATEX.get(character, character)
