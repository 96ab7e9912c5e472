"""`export`: curated pairs as a Hugging Face dataset folder with a card; pushed to the hub when asked."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import polars as pl
import yaml

from pipeline.inspect import table_files
from schemas import files
from schemas.config import RunConfig
from schemas.errors import UserError
from stages.text.markdown import escape


def export_dataset(config: RunConfig, out: Path, round_: int | None, push: str | None, private: bool) -> Path:
    """Write data/train-*.parquet and README.md; returns the folder.

    round_: default the last finished one. Raises UserError if nothing is curated or the folder holds something else.
    """
    wanted = range(config.rounds - 1, -1, -1) if round_ is None else [round_]
    parts: list[Path] = []
    for candidate in wanted:
        try:
            parts, round_ = table_files(config.folder, "curated", candidate), candidate
            break
        except UserError:
            if candidate == wanted[-1]:
                raise
    data = out / "data"
    if out.is_symlink() or data.is_symlink() or (out.exists() and _foreign(out)):
        raise UserError("This folder holds something else", where=str(out), fix="Name an empty one with --out.")
    with files.publishing(data) as fresh:
        fresh.mkdir()
        for index, part in enumerate(parts):
            shutil.copyfile(part, fresh / f"train-{index:05d}-of-{len(parts):05d}.parquet")
    counts = pl.scan_parquet(parts, glob=False).group_by("language").len().sort("language").collect().rows()
    files.write_text(out / "README.md", dataset_card(config, round_ or 0, dict(counts)))
    if push:
        _push(out, push, private)
    return out


def _foreign(out: Path) -> bool:
    """Whether there is anything in the folder that an earlier export did not write."""
    if not out.is_dir():
        return True
    entries = [
        entry for entry in out.iterdir() if entry.name not in ("data", "README.md") and not files.is_temporary(entry)
    ]
    parts = list((out / "data").iterdir()) if (out / "data").is_dir() else []
    known = all(re.fullmatch(r"train-\d{5}-of-\d{5}\.parquet", part.name) and part.is_file() for part in parts)
    return bool(entries) or not known or ((out / "README.md").exists() and not parts)


def dataset_card(config: RunConfig, round_: int, counts: dict[str, int]) -> str:
    """Model-card Markdown with YAML metadata. counts: language -> pairs."""
    meta = yaml.safe_dump(
        {
            "language": sorted({code.split("-")[0] for code in counts}),
            "tags": ["preference", "dpo", "trl", "congrad"],
            "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
        },
        sort_keys=False,
        allow_unicode=True,
    )
    rows = "\n".join(f"| {escape(language)} | {count:,} |" for language, count in sorted(counts.items()))
    answers = f"answers of {escape(config.model.policy)}, judged by a model"
    origin = "an existing preference data set" if config.imported else answers
    kept = "by gradient conflict" if config.select.by == "conflict" else "by a baseline, not by gradient conflict"
    return f"""---
{meta}---
# {escape(config.name)}: curated preference pairs

{sum(counts.values()):,} preference pairs (columns `prompt`, `chosen`, `rejected` as messages) made from {origin}
and kept {kept} (round {round_}): pairs were ranked by `select.by: {config.select.by}` and a share of
{config.select.keep:g} was kept. ConGrad's code was never published; keep ratio, sketch size and similarity measure
are this pipeline's choices.
The texts were not checked by people and may be wrong or harmful.

| language | pairs |
|---|---|
{rows}
"""


def _push(folder: Path, repo: str, private: bool) -> None:
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise UserError("Pushing needs the package huggingface_hub", fix="pip install huggingface_hub") from error
    api = HfApi()
    try:
        api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repo, repo_type="dataset", allow_patterns=["data/*", "README.md"])
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"Pushing to {repo} failed: {error}",
            fix=f"The dataset is written to {folder}; `hf auth login`, then export again.",
        ) from error
