"""`export`: curated pairs as a Hugging Face dataset folder with a card; pushed to the hub when asked."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from pipeline.damage import refuse_damaged
from pipeline.dataset_card import Contents, dataset_card
from pipeline.export_folder import exporting
from pipeline.export_folder import push as send
from pipeline.fingerprint import content_of
from pipeline.plan import State, not_current
from pipeline.selection import refuse_round
from pipeline.status import recorded_planner
from schemas.config import RunConfig
from schemas.errors import UserError
from schemas.ids import content_id
from stages.spec import StageSpec

_TABLE = "curated"


def export_dataset(config: RunConfig, out: Path, round_: int | None, push: str | None, private: bool) -> Path:
    """Write data/train-*-HASH.parquet and README.md; returns the folder.

    The hash of the content is in the files' names and in the card, because `datasets` takes a folder of the same name with the same
    card for the same data, and would load what it cached of another export.

    round_: default the last finished one. Raises UserError if nothing current is curated, and as `exporting` and `push`.
    """
    states = recorded_planner(config, config.folder).states()
    made = finished(config, states, lambda spec: _TABLE in spec.writes, round_, "table 'curated'")
    assert made.manifest is not None
    records = made.manifest.table_files(_TABLE)
    parts = [config.folder / record.path for record in records]
    refuse_damaged(config.folder, _TABLE, records)
    content = content_id(content_of(records))[:16]
    counts = pl.scan_parquet(parts, glob=False).group_by("language").len().sort("language").collect().rows()
    names = [f"data/train-{index:05d}-of-{len(parts):05d}-{content}.parquet" for index in range(len(parts))]
    contents = Contents(
        f"data/train-*-{content}.parquet", dict(counts), sum(r.bytes for r in records), sum(map(_raw_bytes, parts))
    )
    upstream = states[: states.index(made) + 1]
    through = [s.manifest for s in upstream if s.kind == "done" and s.manifest and _is_of(s, made)]
    with exporting(out) as folder:
        (folder / "data").mkdir()
        for name, part in zip(names, parts, strict=True):
            shutil.copyfile(part, folder / name)
        (folder / "README.md").write_text(dataset_card(config, made.step.round, contents, through), encoding="utf-8")
    if push:
        send(out, push, "dataset", private, replaced=["data/*"])
    return out


def finished(
    config: RunConfig, states: Sequence[State], of: Callable[[StageSpec], bool], round_: int | None, what: str
) -> State:
    """The step that is exported: of the round asked for, or the last that is finished and current.

    Raises UserError, with the reason, for results that are not current: nothing else is ever given away.
    """
    steps = [s for s in states if of(s.step.spec)]
    if round_ is not None:
        refuse_round(round_, (s.step.round for s in steps), "--round")
        steps = [s for s in steps if s.step.round == round_]
    done = [s for s in steps if s.kind == "done"]
    if done:
        return done[-1]
    where, last = str(config.folder), steps[-1] if steps else None
    if last is not None and last.kind in ("changed", "stale"):
        raise UserError(
            f"The {what} that is there is not current: {not_current(last)}",
            where=where,
            fix="Run it again: congrad run CONFIG."
            if last.lost
            else "Run the pipeline with the settings you want, then export: results that were finished are found, not made anew.",
        )
    raise UserError(
        f"Round {round_ or 0} of this run has no finished {what}",
        where=where,
        fix="Run it first: congrad run CONFIG.",
    )


def _is_of(state: State, made: State) -> bool:
    """Whether a stage comes before the curated pairs: of their round, or of all rounds."""
    return not state.step.spec.per_round or state.step.round == made.step.round


def _raw_bytes(part: Path) -> int:
    meta = pq.read_metadata(part)
    return sum(meta.row_group(n).total_byte_size for n in range(meta.num_row_groups))
