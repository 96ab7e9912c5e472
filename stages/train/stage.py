"""Train: DPO on the curated pairs with TRL, resumable, ending in a merged model."""

from __future__ import annotations

import time
from collections.abc import Iterator

from stages.contract import Account, ArtifactStage, Context, Rows, tally
from stages.train.card import Training, model_card
from stages.train.export import exported, write_cards
from stages.train.gang import run_together
from stages.train.job import train_job
from stages.train.loggers import check_loggers
from stages.train.memory import memory_named
from stages.train.metrics import metrics_table, training_totals
from stages.train.processes import process_count


class Train(ArtifactStage):
    """curated -> metrics, model.

    ctx.folder holds checkpoints/, logs/, adapter/ (LoRA), model/ (merged safetensors, tokenizer, card). A run that was
    killed or stopped continues from its last complete checkpoint; on the CPU in float32 it then ends with the same
    weights bit for bit, if it continues with the same number of processes. Raises UserError for what the config or the data
    make impossible, Stopped when asked to stop.
    """

    def run(self, ctx: Context) -> Iterator[Rows | Account]:
        """Train, in `train.processes` processes on each of `train.nodes` machines, then yield the metrics and the account (unit: pair)."""
        folder = ctx.folder
        if folder is None:
            raise ValueError("train needs a folder")
        config, started = ctx.config, time.monotonic()
        check_loggers(config.train)
        processes = process_count(config)
        if processes == 1 and not ctx.machines:
            with memory_named(config.train.section):
                outcome = train_job(ctx)
        else:
            outcome = run_together(train_job, ctx, processes)
        tallies = tally("pair", outcome.languages, outcome.drops)
        steps = max(entry["step"] for entry in outcome.history)
        training = Training(ctx.models["policy"], ctx.models["reference"], ctx.round, outcome.seen, outcome.plan, steps)
        write_cards(folder, model_card(config, training))
        yield Rows("metrics", metrics_table(outcome.history))
        yield Account(
            tallies=tallies,
            drops=outcome.drops,
            stats={
                "steps": float(steps),
                "pairs_seen": float(outcome.seen.count),
                "seconds": time.monotonic() - started,
                **training_totals(outcome.history),
            },
            artifacts=exported(folder),
        )
