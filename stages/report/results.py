"""Before and after training: every measured value per split, metric and language."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from stages.report.charts import ChangeBar, changes
from stages.report.data import Tables
from stages.report.svg import Format
from stages.report.tax import SPLIT as BENCHMARK
from stages.report.tax import Tax, tax
from stages.report.text import number, percent, short, spaced
from stages.text.codes import in_order

ALL = "all"
SPLITS = {
    "test": "Test: held-out prompts and pairs of the trained languages",
    "authored": "Authored pairs: the rejected answer is wrong by construction",
    "unseen": "Unseen languages: never trained on",
    "dev": "Dev: used for choices, not for claims",
    BENCHMARK: "Benchmarks of lm-evaluation-harness: what alignment costs elsewhere",
}


@dataclass(frozen=True)
class Measure:
    """How a metric is shown. reference: the value that means no preference or no change, for comparisons."""

    title: str
    meaning: str
    share: bool = False
    reference: float | None = None

    @property
    def show(self) -> Format:
        """Shares as percentages, the rest as numbers."""
        return _one_decimal if self.share else number

    @property
    def axis(self) -> Format:
        """The same on an axis."""
        return percent if self.share else short


METRICS = {
    "accuracy": Measure(
        "Preference accuracy",
        "Share of pairs whose chosen answer gets the higher mean log-probability per token; ties count one half, "
        "so 50% is guessing",
        share=True,
        reference=0.5,
    ),
    "win_rate": Measure(
        "Win rate",
        "How often the evaluation judge prefers the answer after training to the one before, asked in both orders; "
        "equal answers and verdicts that change with the order count one half",
        share=True,
        reference=0.5,
    ),
    "win_rate_self_judged": Measure(
        "Win rate, self-judged",
        "How often the untrained model itself, as the judge, prefers the answer after training to its own, asked in "
        "both orders; equal answers and verdicts that change with the order count one half",
        share=True,
        reference=0.5,
    ),
    "win_rate_length_controlled": Measure(
        "Win rate at equal length",
        "The win rate that a logistic regression on the difference in length expects for equally long answers",
        share=True,
        reference=0.5,
    ),
    "win_rate_self_judged_length_controlled": Measure(
        "Win rate at equal length, self-judged",
        "The self-judged win rate that a logistic regression on the difference in length expects for equally long answers",
        share=True,
        reference=0.5,
    ),
    **{
        name: Measure(
            title,
            f"How often {judge} prefers the answer to that of the baseline (evaluate.baseline), asked in both orders; "
            f"equal answers and verdicts that change with the order count one half{ending}",
            share=True,
            reference=0.5,
        )
        for name, title, judge, ending in (
            ("baseline_win_rate", "Win rate against the baseline", "the evaluation judge", ""),
            (
                "baseline_win_rate_self_judged",
                "Win rate against the baseline, judged by the policy",
                "the untrained model, as the judge,",
                "",
            ),
            (
                "baseline_win_rate_length_controlled",
                "Win rate against the baseline at equal length",
                "the evaluation judge",
                "; what a logistic regression on the difference in length expects for equally long answers",
            ),
            (
                "baseline_win_rate_self_judged_length_controlled",
                "Win rate against the baseline at equal length, judged by the policy",
                "the untrained model, as the judge,",
                "; what a logistic regression on the difference in length expects for equally long answers",
            ),
        )
    },
    "implicit_reward_accuracy": Measure(
        "Implicit-reward accuracy",
        "Share of pairs on which training raised the chosen answer's log-probability more than the rejected one's, "
        "against the round-0 model; before training every pair is a tie",
        share=True,
        reference=0.5,
    ),
    "answer_language": Measure(
        "Answers in the prompt's language", "Share of answers identified as the language of their prompt", share=True
    ),
    "truncated": Measure("Truncated answers", "Share of answers cut off by the token limit", share=True),
    "empty": Measure("Empty answers", "Share of answers without any text", share=True),
    "repetition": Measure(
        "Repetition",
        "Mean share of an answer's runs of 16 characters that occurred in it before; a loop is near 100%",
        share=True,
    ),
    "characters": Measure("Length of answers", "Mean characters of an answer"),
    "refused": Measure(
        "Refusals",
        "Share of answers that begin with a phrase of refusal (data/refusals; crude, and only of languages with a list)",
        share=True,
    ),
    "benchmarks": Measure(
        "Benchmarks, mean", "Mean over the tasks of the metric that each names first, where it is a share", share=True
    ),
    "benchmarks_change": Measure(
        "Benchmarks, change", "What the mean over tasks gained; below zero it is the tax", share=True, reference=0.0
    ),
    "logp_chosen": Measure(
        "Log-probability of chosen answers",
        "Mean log-probability per token, in nats; a fall on chosen answers is common after DPO and worth watching",
    ),
    "logp_rejected": Measure("Log-probability of rejected answers", "Mean log-probability per token, in nats"),
    "judge_consistency": Measure(
        "Judge consistency",
        "Share of differing answers on which the judge says the same in both orders; near one half or below, the win "
        "rate says little",
        share=True,
    ),
    "judge_agreement": Measure(
        "Agreement of two judges",
        "Share of differing answers on which the second judge has the same verdict (win, loss or tie)",
        share=True,
    ),
    "judge_kappa": Measure(
        "Agreement of two judges beyond chance",
        "Cohen's kappa of their verdicts: 1 they always agree, 0 as often as their habits alone would give",
    ),
    "judge_mass": Measure(
        "Judge's attention to the question", "Mean probability the judge puts on its two possible replies", share=True
    ),
}
CHANGE_OF = "_change"


@dataclass(frozen=True)
class ResultRow:
    """One language.

    change: after minus before, or the comparison minus its reference, with its own interval where it was measured pair
    by pair; clear: that interval leaves out 0 (without one: the intervals before and after do not overlap).
    """

    language: str
    before: float | None
    after: float | None
    versus: float | None
    before_interval: tuple[float, float] | None
    after_interval: tuple[float, float] | None
    versus_interval: tuple[float, float] | None
    n: int
    change: float | None
    change_interval: tuple[float, float] | None
    clear: bool


@dataclass(frozen=True)
class MeasureTable:
    """One metric on one split. paired: rows have before and after; else they compare after with before directly."""

    name: str
    metric: Measure
    paired: bool
    rows: list[ResultRow]
    chart: Markup


@dataclass(frozen=True)
class Results:
    """One round: splits in reading order, each with its title and metrics; tax: of benchmarks, if there are any."""

    round: int
    splits: list[tuple[str, str, list[MeasureTable]]]
    tax: Tax | None = None


def results(tables: Tables, round_: int, languages: Sequence[str]) -> Results | None:
    """None when nothing was evaluated."""
    columns = ["model", "split", "language", "metric", "value", "n", "low", "high"]
    rows = tables.read("evaluation", round_, columns).rows(named=True)
    if not rows:
        return None
    splits = []
    for split in in_order(list(SPLITS), [row["split"] for row in rows if row["split"] != BENCHMARK]):
        mine = [row for row in rows if row["split"] == split]
        found = {row["metric"] for row in mine}
        names = in_order(list(METRICS), [name for name in found if name.removesuffix(CHANGE_OF) not in found - {name}])
        measured = [_measured(name, mine, languages) for name in names]
        splits.append((split, SPLITS.get(split, split), measured))
    return Results(round_, splits, tax(rows))


def measure_of(name: str) -> Measure:
    """How a measure is shown: one that others brought under its own name, as a proportion."""
    return METRICS.get(name) or Measure(spaced(name).capitalize(), "")


def _measured(name: str, rows: list[dict], languages: Sequence[str]) -> MeasureTable:
    metric = measure_of(name)
    changed = {row["language"]: row for row in rows if row["metric"] == name + CHANGE_OF}
    rows = [row for row in rows if row["metric"] == name]
    by_key = {(row["language"], row["model"]): row for row in rows}
    order = in_order([ALL, *languages], [row["language"] for row in rows])
    paired = any(row["model"] in ("before", "after") for row in rows)
    built = [_row(language, by_key, changed.get(language, {}), metric) for language in order]
    shown = [
        ChangeBar(r.language, r.before, r.after, r.before_interval, r.after_interval)
        if paired
        else ChangeBar(r.language, None, r.versus, None, r.versus_interval)
        for r in built
        if r.before is not None or r.after is not None or r.versus is not None
    ]
    label = f"{metric.title} per language"
    chart = changes(shown, label, x_format=metric.axis, reference=metric.reference) if shown else Markup("")
    return MeasureTable(name, metric, paired, built, chart)


def _row(language: str, by_key: dict[tuple[str, str], dict], changed: dict, metric: Measure) -> ResultRow:
    before, after, versus = (by_key.get((language, model), {}) for model in ("before", "after", "after vs before"))
    first, last, compared = (_interval(row) for row in (before, after, versus))
    change, span, clear = changed.get("value"), _interval(changed), False
    if change is None and before.get("value") is not None and after.get("value") is not None:
        change = after["value"] - before["value"]
        clear = bool(first and last and (first[1] < last[0] or last[1] < first[0]))
    elif change is None and versus.get("value") is not None and metric.reference is not None:
        change = versus["value"] - metric.reference
        clear = bool(compared and not compared[0] <= metric.reference <= compared[1])
    elif change is not None:
        clear = bool(span and not span[0] <= 0 <= span[1])
    return ResultRow(
        language=language,
        before=before.get("value"),
        after=after.get("value"),
        versus=versus.get("value"),
        before_interval=first,
        after_interval=last,
        versus_interval=compared,
        n=max(row.get("n", 0) for row in (before, after, versus)),
        change=change,
        change_interval=span,
        clear=clear,
    )


def _interval(row: dict) -> tuple[float, float] | None:
    low, high = row.get("low"), row.get("high")
    return (low, high) if low is not None and high is not None else None


def _one_decimal(value: float) -> str:
    return percent(value, 1)
