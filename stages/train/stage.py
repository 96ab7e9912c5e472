"""Train: DPO on the curated pairs with TRL, resumable, ending in a merged model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from schemas.tables import TABLES
from stages.contract import Account, ArtifactStage, Context, Rows, tally
from stages.train.card import model_card
from stages.train.export import exported
from stages.train.job import train_job
from stages.train.loggers import check_loggers
from stages.train.memory import memory_named
from stages.train.processes import process_count, run_together

_SUMS = ("train_runtime", "total_flos")
_RATES = ("train_samples_per_second", "train_steps_per_second", "train_loss")


class Train(ArtifactStage):
    """curated -> metrics, model.

    ctx.folder holds checkpoints/, logs/, adapter/ (LoRA), model/ (merged safetensors, tokenizer, card). A run that was
    killed or stopped continues from its last complete checkpoint; on the CPU in float32 it then ends with the same
    weights bit for bit, if it continues with the same number of processes. Raises UserError for what the config or the data
    make impossible, Stopped when asked to stop.
    """

    def run(self, ctx: Context) -> Iterator[Rows | Account]:
        """Train, in `train.processes` processes, then yield the metrics and the account (unit: pair)."""
        folder = ctx.folder
        if folder is None:
            raise ValueError("train needs a folder")
        config, started = ctx.config, time.monotonic()
        check_loggers(config.train.report_to)
        processes = process_count(config)
        if processes == 1:
            with memory_named():
                outcome = train_job(ctx)
        else:
            outcome = run_together(train_job, ctx, processes)
        tallies = tally("pair", outcome.languages, outcome.drops)
        trained_on = {t.language: t.kept for t in tallies}
        card = folder / "model" / "README.md"
        policy, reference = ctx.models["policy"].name, ctx.models["reference"].name
        steps = max(entry["step"] for entry in outcome.history)
        text = model_card(config, ctx.round, policy, reference, trained_on, outcome.plan, steps)
        card.write_text(text, encoding="utf-8")
        yield Rows("metrics", metrics_table(outcome.history))
        yield Account(
            tallies=tallies,
            drops=outcome.drops,
            stats={"steps": float(steps), "seconds": time.monotonic() - started, **_summary(outcome.history)},
            artifacts=exported(folder),
        )


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


def _summary(history: list[dict[str, Any]]) -> dict[str, float]:
    """What TRL says at the end of a training; of a sequence, seconds and operations are summed over its objectives, and the
    rest averaged by their seconds."""
    ends = [entry for entry in history if "train_runtime" in entry]
    found = {name: sum(float(end.get(name, 0.0)) for end in ends) for name in _SUMS}
    for name in _RATES:
        weighted = sum(float(end.get(name, 0.0)) * float(end["train_runtime"]) for end in ends)
        found[name] = weighted / found["train_runtime"] if found["train_runtime"] else math.nan
    return {name: value for name, value in found.items() if ends and math.isfinite(value)}
