"""The figures behind the page: counts against NumPy, totals against the manifests, samples that are balanced."""

from __future__ import annotations

import itertools
import re

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.config.judging import JudgeConfig
from stages.report.browser import browser, evenly, shares
from stages.report.charts import Series, bin_counts, histogram, share_bar
from stages.report.conflicts import conflicts
from stages.report.data import Tables
from stages.report.distributions import scores, sides
from stages.report.flow import flows
from stages.report.headline import cards
from stages.report.page import render
from stages.report.results import results
from stages.report.svg import element, ticks
from stages.report.text import clip, fixed, number, percent, seconds
from stages.report.view import build_view
from stages.text.visible import visible


def test_values_outside_are_counted_at_the_ends():
    assert bin_counts([-9, 0.1, 9], [0, 0.25, 0.5, 0.75, 1]) == [2, 0, 0, 1]
    assert bin_counts([], [0, 1]) == [0]


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 30), max_size=8), st.integers(0, 100))
def test_shares_use_the_limit_and_differ_only_where_a_group_is_short(available, limit):
    given_ = shares(available, limit)
    assert sum(given_.values()) == min(limit, sum(available.values()))
    assert all(given_[key] <= available[key] for key in available)
    free = [given_[key] for key in available if given_[key] < available[key]]
    assert not free or max(given_.values()) <= min(free) + 1


@given(st.integers(0, 50), st.integers(1, 60))
def test_evenly_keeps_order_and_both_ends(size, n):
    items = list(range(size))
    picked = evenly(items, n)
    assert picked == sorted(set(picked)) and len(picked) == min(n, size)
    if size > 1 and n > 1:
        assert picked[0] == 0 and picked[-1] == size - 1


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e4))
def test_ticks_are_inside_and_evenly_spaced(low, span):
    found = ticks(low, low + span)
    slack = span * 1e-6 + 1e-9
    assert 2 <= len(found) <= 8
    assert low - slack <= found[0] and found[-1] <= low + span + slack
    assert np.allclose(np.diff(found), found[1] - found[0], rtol=1e-6, atol=1e-9)


def test_bars_are_as_high_as_their_counts():
    svg = histogram([0, 1, 2], [Series("kept", "kept", [4, 1]), Series("dropped", "dropped0", [0, 3])], "x", cut=1.0)
    heights = [float(h) for h in re.findall(r'height="([\d.]+)" class="fill-', svg)]
    assert len(heights) == 3
    assert heights[0] == pytest.approx(4 * heights[1], abs=0.05)
    assert heights[2] == pytest.approx(3 * heights[1], abs=0.05)
    assert 'class="cut"' in svg


def test_a_share_bar_fills_its_width():
    svg = share_bar(
        [Series("kept", "kept", [30]), Series("dropped", "dropped0", [9]), Series("failed", "failed", [1])], ""
    )
    assert sum(float(w) for w in re.findall(r' width="([\d.]+)" height="10"', svg)) == pytest.approx(100)
    assert "<rect" not in share_bar([Series("kept", "kept", [0])], "nothing came in")


def test_svg_escapes_text_and_attributes():
    assert element("text", "<b>\u202e", title='"><script>') == (
        '<text title="&#34;&gt;&lt;script&gt;">&lt;b&gt;[U+202E]</text>'
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("a\x00b\x1b", "a[U+0000]b[U+001B]"),
        ("a\u202eb\u2069\u200f", "a[U+202E]b[U+2069][U+200F]"),
        ("pass\u200bword\ufeff\u00ad", "pass[U+200B]word[U+FEFF][U+00AD]"),
        ("a\u2028b", "a[U+2028]\nb"),
        ("line\r\nline\r", "line\nline[U+000D]"),
        ("x\u200dy \u200d", "x[U+200D]y [U+200D]"),
        ("क्\u200dष می\u200cخواهم 👩\u200d🚀", "क्\u200dष می\u200cخواهم 👩\u200d🚀"),
        ("\U000e0041\ufffe", "[U+E0041][U+FFFE]"),
    ],
)
def test_invisible_characters_become_visible_and_scripts_keep_their_joiners(text, shown):
    assert visible(text) == shown


def test_numbers_are_shown_with_sensible_precision():
    assert [number(v) for v in (None, 0.0, 0.123456, -12.345, 1234567.0, 5e-6)] == [
        "–", "0", "0.123", "−12.3", "1,234,567", "5.0e-06",
    ]  # fmt: skip
    assert [fixed(v, 2, True) for v in (0.5, -0.001, 0.0, float("nan"))] == ["+0.50", "−0.00", "0.00", "–"]
    assert [percent(v) for v in (0.0, 0.001, 0.5, 0.999, 1.0)] == ["0%", "<1%", "50%", ">99%", "100%"]
    assert [seconds(v) for v in (8.26, 245, 7800)] == ["8.3 s", "4 min 05 s", "2 h 10 min"]


@given(st.text(max_size=9000))
def test_clipping_loses_nothing_silently(text):
    clipped = clip(text)
    assert text.startswith(clipped.head + clipped.tail)
    assert len(clipped.head) + len(clipped.tail) + clipped.missing == len(text)


def test_flow_totals_are_the_sums_of_the_manifests(build_run):
    builder = build_run(languages=["en", "ar", "hi"], per_language=30)
    (flow,) = flows(builder.run.manifests, ["hi", "en"])
    assert flow.languages == ["hi", "en", "ar"]
    for total in flow.totals:
        tallies = [
            t for m in builder.run.manifests if m.stage == total.stage for t in m.tallies if t.unit == total.unit
        ]
        assert total.rows_in == sum(t.rows_in for t in tallies)
        assert total.kept + total.dropped + total.failed == total.rows_in
        assert sum(flow.cell(language, total).kept for language in flow.languages) == total.kept
    assert [t.stage for t in flow.totals][:4] == ["prompts", "generate", "judge", "pairs"]
    assert all(meaning for total in flow.totals for _, _, meaning in total.reasons)


def test_histograms_hold_every_score_and_the_cut_is_the_lowest_kept(build_run):
    builder = build_run(languages=["en", "ar"], per_language=40)
    tables = Tables(builder.run.inputs)
    shown = scores(tables, 0, ["en", "ar"], by_conflict=True)
    kept = pl.read_parquet(builder.run.inputs["curated:0"])
    dropped = pl.read_parquet(builder.run.inputs["rejected:0"])
    for panel in shown.histograms:
        assert panel.kept == kept.filter(language=panel.language).height
        assert panel.dropped == dropped.filter(language=panel.language).height
        assert panel.cut == kept.filter(language=panel.language)["conflict_score"].min()
        drawn = sum(int(n) for n in re.findall(r"<title>(?:kept|dropped): (\d+) between", panel.chart))
        assert drawn == panel.kept + panel.dropped
    assert scores(tables, 0, ["en"], by_conflict=False).histograms[0].cut is None


def test_before_selection_scores_are_neither_kept_nor_dropped(build_run):
    builder = build_run(languages=["en"], per_language=40)
    del builder.run.inputs["curated:0"], builder.run.inputs["rejected:0"]
    (panel,) = scores(Tables(builder.run.inputs), 0, ["en"], by_conflict=True).histograms
    assert "not yet selected" in panel.chart and "dropped:" not in panel.chart


def test_lengths_are_tokens_where_known_and_characters_otherwise(build_run):
    builder = build_run(languages=["en", "ja"], per_language=12)
    tables = Tables(builder.run.inputs)
    assert [(s.title, s.unit) for s in sides(tables, 0, [], JudgeConfig())] == [
        ("Answer length", "tokens"),
        ("Judge score", "0 to 5"),
        ("Relevance", "nats a token"),
    ]
    del builder.run.inputs["gradients:0"]
    length = sides(tables, 0, [])[0]
    pairs = pl.read_parquet(builder.run.inputs["pairs:0"]).filter(language="ja", split="train")
    expected = np.median([len(row[0]["content"]) for row in pairs["chosen"]])
    assert length.unit == "characters"
    assert next(row[2] for row in length.rows if row[0] == "ja") == expected


def test_judge_scores_are_drawn_on_their_own_scale_for_each_criterion(build_run):
    """A reward model's scores lie anywhere: none may fall outside of the figure's bins but the outer hundredths."""
    builder = build_run(languages=["en"], per_language=40)
    for path in builder.run.inputs["pairs:0"]:
        frame = pl.read_parquet(path)
        criterion = pl.when(pl.int_range(pl.len()) % 2 == 0).then(pl.lit("helpful")).otherwise(pl.lit("harmless"))
        moved = [pl.col(side) * 100 - 700 for side in ("chosen_score", "rejected_score")]
        frame.with_columns(*moved, criterion=criterion).write_parquet(path)
    own = {"method": "reward_model"}
    figures = sides(Tables(builder.run.inputs), 0, ["en"], JudgeConfig(criteria={"helpful": own, "harmless": own}))[1:3]
    assert [(one.title, one.unit) for one in figures] == [
        ("Judge score: helpful", "the reward model's own"),
        ("Judge score: harmless", "the reward model's own"),
    ]
    for one in figures:
        trained = pl.scan_parquet(builder.run.inputs["pairs:0"]).filter(split="train", criterion=one.title[13:])
        assert one.rows[0][1] == trained.collect().height > 10 and one.rows[0][2] < -100
    imported = sides(Tables(builder.run.inputs), 0, ["en"])[1]
    assert (imported.title, imported.unit) == ("Judge score", "the data's own")


def test_relevance_is_drawn_beside_that_of_answers_under_another_prompt(build_run):
    builder = build_run(languages=["en", "ja"], per_language=12)
    (relevance,) = (one for one in sides(Tables(builder.run.inputs), 0, []) if one.beside)
    assert relevance.beside == "under another prompt" and "line-other" in relevance.chart
    assert [row[3] for row in relevance.rows] == pytest.approx([0.4, 0.4])
    path = builder.run.inputs["gradients:0"][0]
    frame = pl.read_parquet(path).with_row_index()
    split = pl.when(pl.col("index") == 0).then(pl.lit("dev")).otherwise("split")  # a trusted pair
    frame.with_columns(split=split).drop("index").write_parquet(path)
    (trained,) = (one for one in sides(Tables(builder.run.inputs), 0, []) if one.beside)
    assert sum(row[1] for row in trained.rows) == sum(row[1] for row in relevance.rows) - 1
    for name, columns in (("gradients:0", ["relevance_chosen", "null_chosen", "null_rejected"]),):
        for path in builder.run.inputs[name]:
            frame = pl.read_parquet(path)
            frame.with_columns(pl.lit(None, frame.schema[column]).alias(column) for column in columns).write_parquet(
                path
            )
    assert not any(one.beside for one in sides(Tables(builder.run.inputs), 0, []))


def test_conflicts_count_each_language_pair_once(build_run):
    builder = build_run(languages=["en", "ar", "hi", "sw"], per_language=30)
    shown = conflicts(Tables(builder.run.inputs), 0, ["en", "ar", "hi", "sw"])
    gram = pl.read_parquet(builder.run.inputs["gram:0"])
    assert [s.name for s in shown.scopes] == ["model", *(f"layers.{i}" for i in range(0, 24, 4))]
    assert shown.few == ["sw"]
    for scope in shown.scopes:
        mine = gram.filter((pl.col("scope") == scope.name) & (pl.col("language") < pl.col("other")))
        assert scope.compared == len(mine) == 6
        assert scope.negative == mine.filter(pl.col("cosine") < 0).height
        assert scope.mean_cosine == pytest.approx(mine["cosine"].mean())
        for row in scope.cells:
            for cell in row:
                assert cell.diagonal or (cell.css[0] == "n") == (cell.cosine < 0)


def test_many_languages_are_one_map_with_the_alike_together_and_a_list_to_search(build_run):
    """Three clusters of ten, mixed in the config, stand apart on the map; layer groups are counted and not drawn."""
    codes = [f"{a}{b}" for a in "abc" for b in "abcdefghij"]
    mixed = [codes[10 * (n % 3) + n // 3] for n in range(30)]
    builder = build_run(languages=["en", "de"], per_language=12)
    rows = [
        {"scope": scope, "language": a, "other": b, "dot": 0.0, "null_negative_rate": 0.1}
        | {"cosine": 1.0 if a == b else 0.4 if a[0] == b[0] else -0.2}
        for scope in ("model", "layers.0")
        for a in mixed
        for b in mixed
    ]
    builder.write("gram:0", rows)
    builder.write("directions:0", [])
    model, layers = conflicts(Tables(builder.run.inputs), 0, mixed).scopes
    together = [code[0] for code in model.languages]
    assert sum(a != b for a, b in itertools.pairwise(together)) == 2 and sorted(model.languages) == codes
    assert model.negative == layers.negative == 300 and not layers.cells
    assert [row.language for row in model.neighbours] == codes
    assert {row.conflicts for row in model.neighbours} == {20}
    first = model.neighbours[0]
    assert {name[0] for name, _ in first.most} == {"a"} and [cosine for _, cosine in first.least] == [-0.2] * 3


def test_a_change_is_clear_only_when_intervals_leave_no_doubt(build_run):
    builder = build_run(languages=["en", "de"], per_language=12)
    row = {"split": "test", "metric": "accuracy", "n": 10}
    rows = [
        row | {"model": "before", "language": "en", "value": 0.5, "low": 0.4, "high": 0.6},
        row | {"model": "after", "language": "en", "value": 0.8, "low": 0.7, "high": 0.9},
        row | {"model": "before", "language": "de", "value": 0.5, "low": 0.4, "high": 0.6},
        row | {"model": "after", "language": "de", "value": 0.6, "low": 0.5, "high": 0.7},
        row | {"model": "before", "language": "fr", "value": None, "low": None, "high": None, "n": 0},
    ]
    builder.write("evaluation:0", rows)
    ((_, _, (measured,)),) = results(Tables(builder.run.inputs), 0, ["en", "de"]).splits
    assert [(r.language, r.clear) for r in measured.rows] == [("en", True), ("de", False), ("fr", False)]
    assert measured.rows[0].change == pytest.approx(0.3)
    assert measured.rows[2].change is None


def test_a_win_rate_is_clear_only_when_its_interval_leaves_out_one_half(build_run):
    builder = build_run(languages=["en", "de", "fr"], per_language=12)
    row = {"split": "test", "model": "after vs before", "metric": "win_rate", "n": 10}
    intervals = {"en": (0.55, 0.8), "de": (0.45, 0.8), "fr": (0.2, 0.45)}
    builder.write(
        "evaluation:0",
        [
            row | {"language": name, "value": sum(ends) / 2, "low": ends[0], "high": ends[1]}
            for name, ends in intervals.items()
        ],
    )
    ((_, _, (measured,)),) = results(Tables(builder.run.inputs), 0, ["en", "de", "fr"]).splits
    assert {r.language: r.clear for r in measured.rows} == {"en": True, "de": False, "fr": True}


def test_a_change_measured_pair_by_pair_replaces_the_difference(build_run):
    builder = build_run(languages=["en", "de"], per_language=12)
    row = {"split": "test", "language": "en", "n": 10}
    before = row | {"model": "before", "metric": "accuracy", "value": 0.5, "low": 0.4, "high": 0.6}
    after = row | {"model": "after", "metric": "accuracy", "value": 0.6, "low": 0.5, "high": 0.7}
    change = row | {"model": "after vs before", "metric": "accuracy_change", "value": 0.1, "low": 0.05, "high": 0.15}
    alone = row | {"model": "after vs before", "metric": "odd_change", "value": 0.1, "low": 0.05, "high": 0.15}
    builder.write("evaluation:0", [before, after, change, alone])
    ((_, _, measures),) = results(Tables(builder.run.inputs), 0, ["en"]).splits
    assert [m.name for m in measures] == ["accuracy", "odd_change"]
    (shown,) = measures[0].rows
    assert (shown.change, shown.change_interval, shown.clear) == (0.1, (0.05, 0.15), True)
    assert measures[1].rows[0].change is None


def test_the_browser_reads_both_sides_best_first(build_run):
    builder = build_run(languages=["en", "ar"], per_language=40)
    shown = browser(Tables(builder.run.inputs), 0, ["ar", "en"], 20)
    assert shown.languages == ["ar", "en"]
    for pairs, reasons in ((shown.kept, {None}), (shown.dropped, {"below cut"})):
        found = [pair.score for pair in pairs]
        assert found == sorted(found, reverse=True) and len(found) == 10
        assert {pair.reason for pair in pairs} == reasons
    assert shown.kept_total + shown.dropped_total == len(pl.read_parquet(builder.run.inputs["scores:0"]))


def test_the_headline_takes_the_larger_of_test_and_authored_pairs_and_never_unseen(build_run):
    builder = build_run(languages=["en", "de"], per_language=12)
    rows = [
        {"model": model, "split": split, "language": "all", "metric": "accuracy", "value": value, "n": n}
        for split, n, before, after in (("test", 3, 1.0, 1.0), ("authored", 12, 0.25, 0.5), ("unseen", 90, 0.9, 0.9))
        for model, value in (("before", before), ("after", after))
    ]
    builder.write("evaluation:0", [row | {"low": None, "high": None} for row in rows])
    tables = Tables(builder.run.inputs)
    shown = {card.title: card for card in cards(tables, [], [results(tables, 0, [])])}
    assert shown["Held-out accuracy"].value == "25.0% → 50.0%"
    assert "12 authored pairs" in shown["Held-out accuracy"].detail
    total = len(pl.read_parquet(builder.run.inputs["pairs:0"]))
    assert shown["Preference pairs"].value == str(total)


def test_the_share_that_is_kept_is_of_pairs_that_have_a_score(build_run):
    builder = build_run(languages=["en"], per_language=40)
    path = builder.run.inputs["rejected:0"][0]
    frame = pl.read_parquet(path)
    off = ["off_topic"] * 5 + ["no_score"] * 3 + ["below_cut"] * (frame.height - 8)
    frame.with_columns(pl.Series("reason", off)).write_parquet(path)
    kept = len(pl.read_parquet(builder.run.inputs["curated:0"]))
    (card,) = (card for card in cards(Tables(builder.run.inputs), [], []) if card.title == "Kept for training")
    assert card.detail == f"{kept / (kept + frame.height - 8):.0%} of {kept + frame.height - 8} scored pairs"


@pytest.mark.parametrize(
    ("select", "words"),
    [
        ({"by": "conflict", "keep": 0.25}, "top 25% by conflict, per language quota"),
        ({"by": "own_language", "quota": "global"}, "top 50% by own_language (a baseline), per global quota"),
        ({"diversity": {"cells": 40, "share": 0.05}}, "at most 5% from one of 40 cells of alike gradients"),
    ],
)
def test_the_ranking_is_named_and_a_baseline_is_called_one(select, words):
    from schemas.config.curation import SelectConfig
    from stages.report.headline import _selection

    assert words in _selection(SelectConfig.model_validate(select))


def test_a_number_of_steps_is_no_upper_bound():
    from schemas.config import RunConfig
    from stages.report.headline import facts

    values = {"name": "t", "languages": {"seen": ["en"]}, "model": {"policy": "m"}}
    values |= {"pairs": {"sources": [{"path": "p.jsonl"}]}, "train": {"max_steps": 70}}
    values |= {"sft": {"sources": [{"path": "s.jsonl"}], "max_steps": 30}}
    said = dict(facts(RunConfig.model_validate(values), []))
    assert said["Training"].endswith(" a step, 70 steps") and said["Supervised fine-tuning"].endswith(", 30 steps")


def test_benchmarks_have_a_table_of_changes_and_nothing_is_clear_inside_its_interval(build_run):
    builder = build_run(languages=["en", "de"], per_language=4)

    def row(model, language, metric, value, low=None, high=None):
        named = {"model": model, "split": "benchmark", "language": language, "metric": metric}
        return named | {"value": value, "n": 20, "low": low, "high": high}

    rows = [
        row("before", "de", "<b>t_de/acc", 0.5),
        row("before", "de", "<b>t_de/acc_stderr", 0.11),
        row("after", "de", "<b>t_de/acc", 0.3),
        row("after vs before", "de", "<b>t_de/acc_change", -0.2, -0.35, -0.05),
        row("before", "en", "t_en/acc", 0.5),
        row("after", "en", "t_en/acc", 0.6),
        row("after vs before", "en", "t_en/acc_change", 0.1, -0.1, 0.3),
        row("before", "all", "benchmarks", 0.5),
        row("after", "all", "benchmarks", 0.45),
        row("after vs before", "all", "benchmarks_change", -0.05, -0.2, 0.1),
    ]
    builder.write("evaluation:0", rows)
    result = results(Tables(builder.run.inputs), 0, ["en", "de"])
    assert not result.splits, "the tax is a table of its own"
    assert [(r.task, r.language, r.clear) for r in result.tax.rows] == [
        ("", "all", False),
        ("<b>t_de", "de", True),
        ("t_en", "en", False),
    ]
    assert result.tax.rows[1].before_error == 0.11
    page = render(build_view(builder.run.config, Tables(builder.run.inputs), builder.run.manifests))
    assert "&lt;b&gt;t_de" in page and "<b>t_de" not in page
