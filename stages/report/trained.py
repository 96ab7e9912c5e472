"""A page with plots of trained selections: a dot with its 95% interval over seeds for every arm, a chart a split and measure."""

from __future__ import annotations

from importlib.resources import files

import polars as pl
from markupsafe import Markup

from stages.report.charts import ChangeBar, changes
from stages.report.results import ALL, METRICS, SPLITS, measure_of
from stages.report.svg import element


def page(figures: pl.DataFrame, title: str, note: str) -> str:
    """A self-contained page. figures: of `stages.compare.seeds.over_seeds`."""
    mine = figures.filter(pl.col("language") == ALL)
    sections = []
    for split in dict.fromkeys(mine["split"]):
        rows = mine.filter(pl.col("split") == split)
        charts = [_figure(rows.filter(pl.col("metric") == name), name) for name in METRICS if name in rows["metric"]]
        sections.append(
            element("section", element("h2", SPLITS.get(split, split)), element("div", *charts, class_="charts four"))
        )
    style = Markup(files("stages.report").joinpath("style.css").read_text(encoding="utf-8"))  # our own file
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = Markup(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>{}</title><style>{}</style></head>\n'
    ).format(policy, title, style)
    body = element(
        "body", element("header", element("h1", title), element("p", note), class_="top"), element("main", *sections)
    )
    return str(head + body) + "</html>\n"


def _figure(rows: pl.DataFrame, name: str) -> Markup:
    measure = measure_of(name)
    bars = [
        ChangeBar(row["arm"], None, row["mean"], None, None if row["low"] is None else (row["low"], row["high"]))
        for row in rows.iter_rows(named=True)
    ]
    chart = changes(bars, measure.title, x_format=measure.axis, reference=measure.reference)
    return element("figure", element("div", measure.title, class_="title"), chart, class_="panel")
