"""Finished sub-steps on disk: after a crash only the unfinished one is repeated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from schemas import files

_IDENTITY = b"identity"


def is_done(path: Path, identity: str) -> bool:
    """Whether `path` holds the result of a sub-step with this identity."""
    try:
        return (pq.read_schema(path).metadata or {}).get(_IDENTITY) == identity.encode()
    except (OSError, pa.ArrowInvalid):
        return False


def once(path: Path, identity: str, compute: Callable[[], pa.Table]) -> pa.Table:
    """The table in `path`, or `compute()`, published there.

    identity: everything the result depends on (model digest, token ids, sampling): another one computes again.
    """
    if is_done(path, identity):
        return pq.read_table(path)
    table = compute()
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _IDENTITY: identity.encode()})
    with files.publishing(path) as temporary:
        pq.write_table(table, temporary)
    return table
