"""Trials: every damage, seed and filter scored; settings chosen on some seeds and shown on others."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import polars as pl
import torch

from benchmarks.planted.damage import Damage, DamagedSet, plan, plant
from benchmarks.planted.figures import by_language, interval, kept_half, overall, question_weights
from benchmarks.planted.scoring import Setting, gate, gated, numbers, rank_all, score
from benchmarks.planted.sketches import Sketches
from stages.gradients.projections import SketchLayout

Say = Callable[[str], None]

CHOICES: tuple[tuple[dict[str, Any], ...], ...] = (
    (
        {"metric": "raw"},
        {"metric": "unit"},
        {"metric": "coordinate", "q": 0.5},
        {"metric": "coordinate", "q": 1.0},
        {"metric": "layer"},
    ),
    ({"score": "all"}, {"score": "others"}),
    ({"leave_out": "pair"}, {"leave_out": "answers"}, {"leave_out": "group"}),
    ({"direction": "mean"}, {"direction": "ema"}),
    tuple({"surgery": name} for name in ("pcgrad", "mean", "unit_mean", "mgda", "imtl_g", "aligned_mtl", "gradvac")),
    ({"scope": "model"}, {"scope": "layer"}),
)
"""What is chosen, one after another. `weighting` is not among them: in round 0 Delta = 0 and c is the same for all."""


def choose(
    sketches: Mapping[str, Sketches],
    layout: SketchLayout,
    kinds: list[str],
    seeds: Sequence[int],
    start: Setting,
    say: Say,
) -> tuple[Setting, pl.DataFrame]:
    """Greedy choice of a setting on development seeds: factor after factor, the others as they are.

    What counts is the mean over damages and seeds of the AUROC (inside languages; over all pairs for `conflict`).
    Returns the best setting and a row per setting tried: factor, value, auroc, chosen, default.
    """
    damages = [d for seed in seeds for d in plan(list(sketches), kinds, seed)]
    sets = [(damage, plant(sketches, damage)) for damage in damages]
    best, rows = start, list[dict[str, Any]]()
    known: dict[Setting, float] = {}
    steps = sum(len(values) for values in CHOICES)
    begun = time.monotonic()
    for values in CHOICES:
        factor = next(iter(values[0]))
        tried = []
        for value in values:
            setting = best.changed(**value)
            if setting not in known:
                known[setting] = _mean_auroc(sets, setting, layout)
            tried.append((known[setting], setting))
            rows.append({"factor": factor, "setting": str(setting), "auroc": known[setting]})
            left = (time.monotonic() - begun) / len(rows) * (steps - len(rows))
            say(f"choosing {len(rows)} of {steps}: {setting}: {known[setting]:.3f}; {left:.0f} s left")
        best = max(tried, key=lambda pair: pair[0])[1]
    frame = pl.DataFrame(rows).with_columns(
        chosen=pl.col("setting") == str(best), default=pl.col("setting") == str(start)
    )
    return best, frame


def _mean_auroc(sets: Sequence[tuple[Damage, DamagedSet]], setting: Setting, layout: SketchLayout) -> float:
    figures = []
    for damage, damaged in sets:
        value, _ = gated(damaged, setting, layout)
        ones = torch.ones(1, damaged.frame.height // len(damaged.languages), dtype=torch.float64)
        figures.append(float(_figure(damage, value, damaged, ones)[0]))
    return sum(figures) / len(figures)


def _figure(damage: Damage, value_N: torch.Tensor, damaged: DamagedSet, weight_BQ: torch.Tensor) -> torch.Tensor:
    """[B]: inside languages, or over all pairs for `conflict`, where a language is damaged as a whole."""
    n = len(damaged.languages)
    if damage.kind == "conflict":
        return overall(value_N, damaged.damaged_N, n, weight_BQ)
    return by_language(value_N, damaged.damaged_N, n, weight_BQ).nanmean(dim=1)


def show(
    sketches: Mapping[str, Sketches],
    layout: SketchLayout,
    kinds: list[str],
    seeds: Sequence[int],
    settings: Mapping[str, Setting],
    draws: int,
    say: Say,
) -> pl.DataFrame:
    """Every filter on fresh seeds: contrast, damage, share, filter, language ("all": their mean), auroc, low, high, left.

    settings: name -> setting; the first is the one the baselines that need sketches take their directions from. low
    and high: 95% bootstrap over questions of the mean over seeds. left: damaged share of the pairs kept when half of what
    passes the gate is kept, by the select stage's quota per language (for `conflict` by the global one, with language "all").
    """
    found: dict[tuple[str | float, ...], list[torch.Tensor]] = {}
    left: dict[tuple[str | float, ...], list[float]] = {}
    damages = [d for seed in seeds for d in plan(list(sketches), kinds, seed)]
    begun = time.monotonic()
    for number, damage in enumerate(damages):
        damaged = plant(sketches, damage)
        n = len(damaged.languages)
        weight_BQ = question_weights(damaged.frame.height // n, draws, seed=0)
        for name, value_N, pool_N in _rankings(damaged, settings, layout, damage.seed):
            key = (damage.contrast, damage.kind, damage.share, name)
            found.setdefault((*key, "all"), []).append(_figure(damage, value_N, damaged, weight_BQ))
            kept_N = kept_half(damaged.frame, value_N, "global" if damage.kind == "conflict" else "language", pool_N)
            left.setdefault((*key, "all"), []).append(float(damaged.damaged_N[kept_N].double().mean()))
            if damage.kind == "conflict":
                continue
            each_BL = by_language(value_N, damaged.damaged_N, n, weight_BQ)
            for place, code in enumerate(damaged.languages):
                found.setdefault((*key, code), []).append(each_BL[:, place])
                own_N = kept_N & (damaged.language_N == place)
                left.setdefault((*key, code), []).append(float(damaged.damaged_N[own_N].double().mean()))
        seconds = (time.monotonic() - begun) / (number + 1) * (len(damages) - number - 1)
        say(
            f"showing {number + 1} of {len(damages)}: {damage.contrast} {damage.kind} {damage.share:.0%}; {seconds:.0f} s left"
        )
    rows = []
    for row_key, figures in found.items():
        mean, low, high = interval(figures)
        named = dict(zip(("contrast", "damage", "share", "filter", "language"), row_key, strict=True))
        rows.append({**named, "auroc": mean, "low": low, "high": high, "left": statistics.fmean(left[row_key])})
    return pl.DataFrame(rows)


def _rankings(
    damaged: DamagedSet, settings: Mapping[str, Setting], layout: SketchLayout, seed: int
) -> Iterable[tuple[str, torch.Tensor, torch.Tensor]]:
    """(filter's name, what it ranks by, the pairs it may keep): our score under every setting, then the first setting without the relevance
    gate, then the baselines under the first."""
    for name, setting in settings.items():
        yield name, *gated(damaged, setting, layout, seed)
    first = next(iter(settings))
    everyone_N = torch.ones(damaged.frame.height, dtype=torch.bool)
    for column in rank_all(score(damaged, settings[first], layout, seed), seed=seed).iter_columns():
        yield f"{first} without the gate" if column.name == "conflict" else column.name, numbers(column), everyone_N


def held_back(sketches: Mapping[str, Sketches], kinds: list[str], seeds: Sequence[int]) -> pl.DataFrame:
    """The share of damaged and of intact pairs that the relevance gate holds back, mean over seeds: contrast, damage, share, damaged, intact."""
    rows = []
    for damage in [d for seed in seeds for d in plan(list(sketches), kinds, seed)]:
        damaged = plant(sketches, damage)
        held_N = (~gate(damaged)).double()
        rows.append(
            {
                "contrast": damage.contrast,
                "damage": damage.kind,
                "share": damage.share,
                "damaged": float(held_N[damaged.damaged_N].mean()),
                "intact": float(held_N[~damaged.damaged_N].mean()),
            }
        )
    return pl.DataFrame(rows).group_by("contrast", "damage", "share", maintain_order=True).mean()


def correlations(sketches: Mapping[str, Sketches], layout: SketchLayout, setting: Setting) -> pl.DataFrame:
    """Pearson correlation of the score with length, length difference and norm, on the undamaged sets."""
    rows = []
    for contrast, part in sketches.items():
        if contrast == "language":
            continue
        none = torch.zeros(part.frame.height, dtype=torch.bool)
        scores = score(DamagedSet(part.frame, part.sketch_ND, none, part.languages), setting, layout)
        table = part.frame.select(
            length=pl.col("n_chosen") + pl.col("n_rejected"),
            length_difference=pl.col("n_chosen").cast(pl.Int64) - pl.col("n_rejected").cast(pl.Int64),
            norm="norm",
        ).with_columns(score=scores["score"])
        rows += [
            {"contrast": contrast, "with": name, "correlation": table.select(pl.corr("score", name)).item()}
            for name in ("length", "length_difference", "norm")
        ]
    return pl.DataFrame(rows)
