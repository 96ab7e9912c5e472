"""What a training logged, as tables and totals."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa

from schemas.tables import TABLES

_SUMS = ("train_runtime", "total_flos")
_RATES = ("train_samples_per_second", "train_steps_per_second", "train_loss")


def metrics_table(history: list[dict[str, Any]]) -> pa.Table:
    """Every number TRL logged, by step and name, the same for a run that was resumed.

    The summary TRL logs at its end covers only the steps since the last resume: it goes to the account's stats.
    """
    rows = [
        {"step": entry["step"], "name": name, "value": float(value)}
        for entry in history
        if "train_runtime" not in entry
        for name, value in sorted(entry.items())
        if name != "step" and isinstance(value, (int, float))
    ]
    return pa.Table.from_pylist(rows, schema=TABLES["metrics"].schema)


def training_totals(history: list[dict[str, Any]]) -> dict[str, float]:
    """What TRL says at the end of a training; of a sequence, seconds and operations are summed over its objectives, and the
    rest averaged by their seconds."""
    ends = [entry for entry in history if "train_runtime" in entry]
    found = {name: sum(float(end.get(name, 0.0)) for end in ends) for name in _SUMS}
    for name in _RATES:
        weighted = sum(float(end.get(name, 0.0)) * float(end["train_runtime"]) for end in ends)
        found[name] = weighted / found["train_runtime"] if found["train_runtime"] else math.nan
    return {name: value for name, value in found.items() if ends and math.isfinite(value)}
