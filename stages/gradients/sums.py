"""Language directions G_l = sum_i omega_i g_i from the sums of parts: what the first pass of one-sided compression left.

Mean and EMA with a known order are weighted sums with known weights, so every part can be summed alone. Inside a part
the weights sum to 1; parts are joined with n_s / n (mean), or gamma^(minibatches after s) (1 - gamma^(T_s)) / (1 -
gamma^T) (bias-corrected EMA whose minibatches end at a part's end: ours).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import torch
from torch import Tensor

from schemas.config.curation import ConflictConfig
from schemas.errors import UserError
from schemas.ids import content_id
from stages.contract import Context
from stages.gradients.projections import SketchLayout

_ROWS = 16


def sums_key(metadata: Mapping[bytes, bytes], config: ConflictConfig) -> str:
    """One hash of what was sketched (`store_metadata`) and of how parts are joined to a direction.

    The second is in no value of a part whose languages have one minibatch each; the products that gradients makes depend
    on it all the same.
    """
    joined: dict[str, Any] = {"direction": config.direction}
    if config.direction == "ema":
        joined |= {"gamma": config.ema_gamma, "batch": config.ema_batch}
    return content_id({key.decode(): value.decode() for key, value in metadata.items()}, joined)


@dataclass(frozen=True)
class Sums:
    """The parts' sums. languages: those that have pairs, in the run's order, then others; share: (language, part) ->
    the factor that joins the part; n_pairs: language -> pairs in its direction."""

    files: list[Path]
    languages: tuple[str, ...]
    share: Mapping[tuple[str, int], float]
    n_pairs: Mapping[str, int]

    @classmethod
    def open(cls, ctx: Context, key: str | None = None) -> Sums:
        """Raises UserError if parts were made differently, or not as `key` (see `sums_key`) says."""
        files = ctx.inputs["sums"]
        parts = ctx.scan("sums").select("part", "language", "key", "n_pairs", "n_batches").unique().collect()
        keys = set(parts["key"]) | ({key} if key is not None and parts.height else set())
        if len(keys) > 1:
            raise UserError(
                "These gradient sums were made with other layers or projections, another model or another conflict.direction",
                where=str(files[0].parent),
                fix="Redo them: --force-stage aggregate.",
            )
        found = set(parts["language"])
        order = [code for code in ctx.config.languages.seen if code in found]
        languages = (*order, *sorted(found - set(order)))
        share: dict[tuple[str, int], float] = {}
        for language in languages:
            rows = parts.filter(pl.col("language") == language).sort("part")
            for part, value in zip(rows["part"], _shares(ctx.config.conflict, rows), strict=True):
                share[language, part] = value
        totals = parts.group_by("language").agg(pl.col("n_pairs").sum())
        return cls(files, languages, share, dict(totals.iter_rows()))

    def directions(self, layout: SketchLayout) -> Tensor:
        """G [L, D] float64. Raises UserError when a sum is missing or has another size than the layout says."""
        columns = {slot.name: slot.columns for slot in layout.layers}
        index = {code: n for n, code in enumerate(self.languages)}
        sums_LD = torch.zeros(len(self.languages), layout.dim, dtype=torch.float64)
        seen: set[tuple[str, int, str]] = set()
        for file in self.files:
            with pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(_ROWS, columns=["part", "language", "layer", "values"]):
                    values = batch.column("values")
                    names = (batch.column(name).to_pylist() for name in ("part", "language", "layer"))
                    for row, (part, language, layer) in enumerate(zip(*names, strict=True)):
                        one = values[row].values.to_numpy(zero_copy_only=False)
                        where = columns.get(layer, slice(0, 0))
                        if len(one) != where.stop - where.start:
                            raise _damaged(file, f"{layer} has {len(one)} values")
                        share = self.share[language, part]
                        sums_LD[index[language], where] += torch.from_numpy(one.copy()).to(torch.float64) * share
                        seen.add((language, part, layer))
        missing = {(*there, layer) for there in self.share for layer in columns} - seen
        if missing:
            raise _damaged(self.files[0], f"there is no sum of {missing.pop()}")
        return sums_LD

    def omegas(self, contributions: pl.DataFrame) -> Tensor:
        """omega_i [N], float64, of rows of the contributions table."""
        factors = [self.share[key] for key in zip(contributions["language"], contributions["part"], strict=True)]
        return torch.tensor(contributions["omega"].to_list(), dtype=torch.float64) * torch.tensor(
            factors, dtype=torch.float64
        )


def _shares(config: ConflictConfig, rows: pl.DataFrame) -> Iterable[float]:
    """Factors of one language's parts, in part order; they sum to 1."""
    if config.direction == "mean":
        return [n / sum(rows["n_pairs"]) for n in rows["n_pairs"]]
    gamma, total = config.ema_gamma, sum(rows["n_batches"])
    shares, after = [], total
    for n in rows["n_batches"]:
        after -= n
        shares.append(gamma**after * (1 - gamma**n) / (1 - gamma**total))
    return shares


def _damaged(file: Path, what: str) -> UserError:
    return UserError(
        f"The gradient sums are damaged: {what}", where=str(file), fix="Redo them: --force-stage aggregate."
    )
