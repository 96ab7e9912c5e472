"""`export`: curated pairs as a Hugging Face dataset folder with a card; pushed to the hub when asked."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from pipeline.dataset_card import Contents, dataset_card
from pipeline.fingerprint import content_of
from pipeline.plan import State
from pipeline.status import recorded_planner
from schemas import files
from schemas.config import RunConfig
from schemas.errors import UserError
from schemas.ids import content_id

_TABLE = "curated"
_PART = re.compile(r"train-\d{5}-of-\d{5}(-[0-9a-f]{16})?\.parquet")


def export_dataset(config: RunConfig, out: Path, round_: int | None, push: str | None, private: bool) -> Path:
    """Write data/train-*-HASH.parquet and README.md; returns the folder.

    The hash of the content is in the files' names and in the card, because `datasets` takes a folder of the same name with the same
    card for the same data, and would load what it cached of another export.

    round_: default the last finished one. Raises UserError if nothing current is curated or the folder holds something else.
    """
    states = recorded_planner(config, config.folder).states()
    made = _curated(config, states, round_)
    data = out / "data"
    if out.is_symlink() or data.is_symlink() or (out.exists() and _foreign(out)):
        raise UserError("This folder holds something else", where=str(out), fix="Name an empty one with --out.")
    assert made.manifest is not None
    records = made.manifest.table_files(_TABLE)
    parts = [config.folder / record.path for record in records]
    if bad := [record for record in records if not files.is_intact(config.folder, record, thorough=True)]:
        raise UserError(
            "This part of curated is no longer what was written", where=bad[0].path, fix="Delete it and run again."
        )
    content = content_id(content_of(records))[:16]
    with files.publishing(data) as fresh:
        fresh.mkdir()
        for index, part in enumerate(parts):
            shutil.copyfile(part, fresh / f"train-{index:05d}-of-{len(parts):05d}-{content}.parquet")
    counts = pl.scan_parquet(parts, glob=False).group_by("language").len().sort("language").collect().rows()
    contents = Contents(
        f"data/train-*-{content}.parquet", dict(counts), sum(r.bytes for r in records), sum(map(_raw_bytes, parts))
    )
    upstream = states[: states.index(made) + 1]
    through = [s.manifest for s in upstream if s.kind == "done" and s.manifest and _is_of(s, made)]
    files.write_text(out / "README.md", dataset_card(config, made.step.round, contents, through))
    if push:
        _push(out, push, private)
    return out


def _curated(config: RunConfig, states: list[State], round_: int | None) -> State:
    """The step whose curated pairs are exported: of the round asked for, or the last that has some."""
    steps = [s for s in states if _TABLE in s.step.spec.writes and round_ in (None, s.step.round)]
    done = [s for s in steps if s.kind == "done"]
    if done:
        return done[-1]
    where, last = str(config.folder), steps[-1] if steps else None
    if last is not None and last.kind in ("changed", "stale"):
        raise UserError(
            f"The curated pairs that are there are of other settings than the run's: {'; '.join(last.why)}",
            where=where,
            fix="Run the pipeline with the settings you want, then export: results that were finished are found, not made anew.",
        )
    raise UserError(
        f"Round {round_ or 0} of this run has no finished table 'curated'",
        where=where,
        fix="Run it first: python -m pipeline run CONFIG.",
    )


def _is_of(state: State, made: State) -> bool:
    """Whether a stage comes before the curated pairs: of their round, or of all rounds."""
    return not state.step.spec.per_round or state.step.round == made.step.round


def _raw_bytes(part: Path) -> int:
    meta = pq.read_metadata(part)
    return sum(meta.row_group(n).total_byte_size for n in range(meta.num_row_groups))


def _foreign(out: Path) -> bool:
    """Whether there is anything in the folder that an earlier export did not write."""
    if not out.is_dir():
        return True
    entries = [
        entry for entry in out.iterdir() if entry.name not in ("data", "README.md") and not files.is_temporary(entry)
    ]
    parts = list((out / "data").iterdir()) if (out / "data").is_dir() else []
    known = all(_PART.fullmatch(part.name) and part.is_file() for part in parts)
    return bool(entries) or not known or ((out / "README.md").exists() and not parts)


def _push(folder: Path, repo: str, private: bool) -> None:
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise UserError("Pushing needs the package huggingface_hub", fix="pip install huggingface_hub") from error
    api = HfApi()
    try:
        api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            folder_path=folder,
            repo_id=repo,
            repo_type="dataset",
            allow_patterns=["data/*", "README.md"],
            delete_patterns=["data/*"],
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"Pushing to {repo} failed: {error}",
            fix=f"The dataset is written to {folder}; `hf auth login`, then export again.",
        ) from error
