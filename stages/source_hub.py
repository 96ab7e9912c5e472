"""Rows of a Hugging Face dataset, as dicts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from schemas.config.sources import Source
from schemas.errors import UserError, first_line


def read_hub(source: Source) -> Iterator[dict[str, Any]]:
    """Rows of a Hugging Face dataset, streamed. Datasets that need a script to load are refused."""
    where = source.path + (f", {source.name}" if source.name else "") + f", split {source.hub_split}"
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"reading the Hugging Face dataset {source.path} needs the `datasets` package, which is not installed",
            fix='Install it (pip install -e ".[cpu]"), or give a local file.',
        ) from error
    try:
        data = datasets.load_dataset(
            source.path, source.name, split=source.hub_split, revision=source.revision, streaming=True
        )
        for batch in data.iter(batch_size=1024):
            columns = list(batch)
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(columns, values, strict=True))
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"there is no file {source.path}, and no such dataset on the Hugging Face hub",
            where=where,
            fix="Check the spelling; a gated or private dataset needs `hf auth login`.",
        ) from error
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        raise UserError(
            f"the dataset {source.path} needs a script to load, and scripts are not run",
            where=where,
            fix="Many such datasets have a Parquet copy: set the source's `revision: refs/convert/parquet`.",
        ) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"the dataset {source.path} cannot be read: {first_line(error)}",
            where=where,
            fix="If you meant a local file, there is none of this name. Otherwise check network, name and split.",
        ) from error
