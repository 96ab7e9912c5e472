"""The trials' tables as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def overview(shown: pl.DataFrame) -> str:
    """A row a damage, a column a filter: AUROC; the best filter of a row in bold, its interval for the first filter."""
    whole = shown.filter(pl.col("language") == "all")
    filters = list(dict.fromkeys(whole["filter"]))
    rows = []
    for (contrast, damage, share), part in whole.group_by(["contrast", "damage", "share"], maintain_order=True):
        value = dict(zip(part["filter"], part["auroc"], strict=True))
        first = part.row(0, named=True)
        best = max(value.values())
        cells = [f"**{value[f]:.2f}**" if value[f] == best and damage != "null" else f"{value[f]:.2f}" for f in filters]
        rows.append(
            [
                f"{contrast}, {_named(str(damage), float(str(share)))}",
                *cells,
                f"{first['low']:.2f} to {first['high']:.2f}",
            ]
        )
    means = whole.filter(pl.col("damage") != "null").group_by("filter").agg(pl.col("auroc").mean())
    mean = dict(means.iter_rows())
    rows.append(["mean without null", *(f"{mean[f]:.2f}" for f in filters), ""])
    return table(["damage", *(f.replace("_", " ") for f in filters), f"95% of {filters[0]}"], rows)


def left(shown: pl.DataFrame) -> str:
    """A row a damage, a column a filter: the damaged share of the half that is kept."""
    whole = shown.filter((pl.col("language") == "all") & (pl.col("damage") != "null"))
    filters = list(dict.fromkeys(whole["filter"]))
    rows = []
    for (contrast, damage, share), part in whole.group_by(["contrast", "damage", "share"], maintain_order=True):
        value = dict(zip(part["filter"], part["left"], strict=True))
        rows.append([f"{contrast}, {_named(str(damage), float(str(share)))}", *(f"{value[f]:.1%}" for f in filters)])
    return table(["damage", *(f.replace("_", " ") for f in filters)], rows)


def held_back(found: pl.DataFrame) -> str:
    """What the relevance gate holds back of damaged and of intact pairs."""
    rows = [
        [f"{r['contrast']}, {_named(r['damage'], r['share'])}", f"{r['damaged']:.1%}", f"{r['intact']:.1%}"]
        for r in found.iter_rows(named=True)
    ]
    return table(["damage", "of damaged pairs", "of intact pairs"], rows)


def by_language(shown: pl.DataFrame, name: str) -> str:
    """A row a damage, a column a language: AUROC and interval of one filter."""
    part = shown.filter((pl.col("filter") == name) & (pl.col("language") != "all"))
    languages = list(dict.fromkeys(part["language"]))
    rows = []
    for (contrast, damage, share), few in part.group_by(["contrast", "damage", "share"], maintain_order=True):
        cells = {
            r["language"]: f"{r['auroc']:.2f} ({r['low']:.2f} to {r['high']:.2f})" for r in few.iter_rows(named=True)
        }
        rows.append([f"{contrast}, {_named(str(damage), float(str(share)))}", *(cells[code] for code in languages)])
    return table(["damage", *languages], rows)


def settings(tried: pl.DataFrame) -> str:
    """Every setting tried on the development seeds."""
    rows = [
        [r["factor"], r["setting"], f"{r['auroc']:.3f}", "chosen" if r["chosen"] else "default" if r["default"] else ""]
        for r in tried.iter_rows(named=True)
    ]
    return table(["factor", "setting", "AUROC", ""], rows)


def correlations(found: pl.DataFrame) -> str:
    """Correlation of the score with what it should not be about."""
    rows = [
        [r["contrast"], r["with"].replace("_", " "), f"{r['correlation']:+.2f}"] for r in found.iter_rows(named=True)
    ]
    return table(["contrast", "with", "correlation"], rows)


def cause(found: pl.DataFrame) -> str:
    """Loss change of the other languages after a step on either half."""
    rows = []
    for stepped, half in dict.fromkeys(zip(found["stepped"], found["half"], strict=True)):
        part = found.filter((pl.col("stepped") == stepped) & (pl.col("half") == half))
        others = part.filter(pl.col("language") != stepped)
        cells = [f"{r['language']} {r['change']:+.4f} ± {r['error']:.4f}" for r in part.iter_rows(named=True)]
        mean = others.select(pl.col("change").mean()).item()
        rows.append([stepped, half, f"{part['damaged'][0]:.0%}", f"{mean:+.4f}", ", ".join(cells)])
    return table(["step on", "half", "damaged in it", "other languages, mean", "each"], rows)


def _named(damage: str, share: float) -> str:
    return "conflict (one language)" if damage == "conflict" else f"{damage} {share:.0%}"
