"""The scores that other conflict settings give, by the conflict stage itself, into a folder that is no run's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq

from schemas.config import RunConfig
from schemas.tables import TABLES
from stages.conflict.stage import Conflict
from stages.contract import Context, Progress, Rows


def rescored(
    config: RunConfig, round_: int, inputs: Mapping[str, list[Path]], folder: Path, progress: Progress
) -> Path:
    """The file of the table `scores` with these settings. inputs: what the conflict stage reads. Raises UserError as the stage does."""
    target = folder / "scores.parquet"
    ctx = Context(config, round_, inputs, {}, progress, scratch=folder)
    with pq.ParquetWriter(target, TABLES["scores"].schema) as writer:
        for made in Conflict().run(ctx):
            if isinstance(made, Rows) and made.table == "scores":
                writer.write_table(made.data)
    return target
