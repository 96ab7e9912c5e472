"""Figures of trained selections over seeds: means, 95% intervals, and differences to the first one with the same seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

_T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""0.975 quantiles of Student's t for 1 to 30 degrees of freedom."""
_NORMAL975 = 1.959964


@dataclass(frozen=True)
class Mean:
    """A mean over seeds; low, high: its 95% interval (Student's t), None with one seed, and where all say the same, which tells nothing of another."""

    mean: float
    low: float | None
    high: float | None
    seeds: int


def mean_of(values: Sequence[float]) -> Mean:
    """Of one value per seed, at least one."""
    n = len(values)
    mean = math.fsum(values) / n
    if len(set(values)) == 1:
        return Mean(values[0], None, None, n)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    quantile = _quantile(n - 1)
    half = quantile * math.sqrt(variance / n)
    return Mean(mean, mean - half, mean + half, n)


def _quantile(freedom: int) -> float:
    """Student's t at 0.975; above 30 degrees of freedom by its expansion about the normal one (Abramowitz and Stegun 26.7.5)."""
    if freedom <= len(_T975):
        return _T975[freedom - 1]
    z = _NORMAL975
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def over_seeds(rows: pl.DataFrame) -> pl.DataFrame:
    """Of rows arm, seed, split, language, metric, value, n: a row per arm, split, language and metric, in the order they come.

    mean, low, high (see `Mean`), seeds, n (items measured, of the first seed); difference, difference_low, difference_high: to the first arm,
    seed by seed, so that what a seed does to both cancels; null for that arm itself, and where no seed is in both.
    """
    rows = rows.filter(pl.col("value").is_not_null() & pl.col("value").is_not_nan())
    keys = ["arm", "split", "language", "metric"]
    values: dict[tuple[str, ...], dict[int, float]] = {}
    items: dict[tuple[str, ...], int] = {}
    for row in rows.iter_rows(named=True):
        key = tuple(row[name] for name in keys)
        values.setdefault(key, {})[row["seed"]] = row["value"]
        items.setdefault(key, row["n"])
    first = rows["arm"][0] if rows.height else ""
    found = []
    for key, by_seed in values.items():
        mean = mean_of(list(by_seed.values()))
        other = values.get((first, *key[1:]), {}) if key[0] != first else {}
        both = [by_seed[seed] - other[seed] for seed in by_seed if seed in other]
        gap = mean_of(both) if both else None
        found.append(
            dict(zip(keys, key, strict=True))
            | {"mean": mean.mean, "low": mean.low, "high": mean.high, "seeds": mean.seeds, "n": items[key]}
            | {
                "difference": gap.mean if gap else None,
                "difference_low": gap.low if gap else None,
                "difference_high": gap.high if gap else None,
            }
        )
    numbers = ("mean", "low", "high", "difference", "difference_low", "difference_high")
    schema = {name: pl.String for name in keys} | {"seeds": pl.Int64, "n": pl.Int64} | {n: pl.Float64 for n in numbers}
    return pl.DataFrame(found, schema_overrides=schema) if found else pl.DataFrame(schema=schema)
