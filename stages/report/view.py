"""Everything the template shows, worked out: tables and manifests in, plain values and finished charts out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from markupsafe import Markup

from schemas.config import RunConfig
from schemas.manifests import StageManifest
from stages.compare.figures import Comparison
from stages.report import beside as _beside
from stages.report import browser as _browser
from stages.report import conflicts as _conflicts
from stages.report import curves as _curves
from stages.report import distributions as _distributions
from stages.report import errors as _errors
from stages.report import flow as _flow
from stages.report import headline as _headline
from stages.report import objectives as _objectives
from stages.report import results as _results
from stages.report.charts import value_bar
from stages.report.data import Tables
from stages.report.provenance import made_by
from stages.report.text import seconds

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """A finished stage: seconds of work and what it counted."""

    stage: str
    round: int
    time: str
    bar: Markup
    stats: list[tuple[str, float]]


_TITLES = {
    "facts": "Run",
    "flow": "Kept and dropped",
    "conflict": "Agreement between languages",
    "weights": "Weights",
    "scores": "Conflict scores",
    "errors": "Known errors",
    "beside": "Other selections",
    "sides": "Lengths, judge scores and relevance",
    "training": "Training",
    "results": "Before and after",
    "pairs": "Pairs",
    "timings": "Time",
}


@dataclass(frozen=True)
class View:
    """The view model of the whole report; a list holds one entry per round that has the thing. sections: id -> title, of those
    with something in them; made: of each, what it was made from; left_out: see `write_page`."""

    config: RunConfig
    config_json: str
    facts: list[tuple[str, str]]
    unfinished: list[str]
    left_out: dict[str, str]
    sections: dict[str, str]
    made: dict[str, list[tuple[str, str]]]
    cards: list[_headline.Card]
    flows: list[_flow.RoundFlow]
    conflicts: list[_conflicts.Conflicts]
    scores: list[_distributions.Scores]
    errors: list[_errors.Errors]
    beside: list[_beside.Beside]
    sides: list[tuple[int, list[_distributions.Sides]]]
    sft: _curves.Curves | None
    curves: list[_curves.Curves]
    objectives: list[_objectives.Objectives]
    results: list[_results.Results]
    browsers: list[_browser.Browser]
    timings: list[Timing]


def build_view(
    config: RunConfig,
    tables: Tables,
    manifests: Sequence[StageManifest],
    left_out: Mapping[str, str] | None = None,
    compared: Mapping[int, Comparison | str] | None = None,
) -> View:
    """Read what there is and prepare it for the template. left_out, compared: see `write_page`."""
    rounds = tables.rounds()
    languages = config.languages.codes

    def each(make: Callable[[int], T | None]) -> list[T]:
        return [made for round_ in rounds if (made := make(round_)) is not None]

    conflicts = each(lambda r: _conflicts.conflicts(tables, r, languages, manifests))
    results = each(lambda r: _results.results(tables, r, languages))
    sequence = [objective.name for objective in config.train.orthalign.objectives]
    select = config.select
    by_conflict = select.by == "conflict" and select.quota == "language" and not select.diversity.cells
    flows = _flow.flows(manifests, languages)
    scores = each(lambda r: _distributions.scores(tables, r, languages, by_conflict))
    errors = each(lambda r: _errors.errors(tables, r, manifests))
    judge = None if config.imported else config.judge
    sides = [(r, found) for r in rounds if (found := _distributions.sides(tables, r, languages, judge))]
    beside = _beside.beside(compared or {})
    sft, curves = _curves.curves(tables, None), each(lambda r: _curves.curves(tables, r))
    browsers = each(lambda r: _browser.browser(tables, r, languages, config.report.browse_pairs))
    timings = _timings(manifests)
    filled = {
        "facts": True,
        "flow": flows,
        "conflict": conflicts,
        "weights": any(scope.weights for one in conflicts for scope in one.scopes),
        "scores": scores,
        "errors": errors,
        "beside": beside,
        "sides": sides,
        "training": sft or curves,
        "results": results,
        "pairs": browsers,
        "timings": timings,
    }
    return View(
        config=config,
        config_json=_headline.config_json(config),
        facts=_headline.facts(config, manifests, results),
        unfinished=[title for title in _headline.unfinished(config, manifests) if title not in (left_out or {})],
        left_out=dict(left_out or {}),
        sections={name: title for name, title in _TITLES.items() if filled[name]},
        made={name: made_by(name, config, manifests) for name in _TITLES},
        cards=_headline.cards(tables, conflicts, results),
        flows=flows,
        conflicts=conflicts,
        scores=scores,
        errors=errors,
        beside=beside,
        sides=sides,
        sft=sft,
        curves=curves,
        objectives=each(lambda r: _objectives.objectives(tables, r, sequence)),
        results=results,
        browsers=browsers,
        timings=timings,
    )


def _timings(manifests: Sequence[StageManifest]) -> list[Timing]:
    ordered = sorted(manifests, key=lambda m: (m.round, _flow.ORDER.index(m.stage) if m.stage in _flow.ORDER else 99))
    longest = max((m.seconds for m in ordered), default=0.0)
    return [
        Timing(
            stage=m.stage,
            round=m.round,
            time=seconds(m.seconds),
            bar=value_bar(m.seconds, 0, longest, f"{m.stage}: {seconds(m.seconds)}", "plain"),
            stats=sorted(m.stats.items()),
        )
        for m in ordered
    ]
