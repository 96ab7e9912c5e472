"""Trusted pairs (`conflict.target`): a run without one is refused before its gradients are made, not after."""

from __future__ import annotations

import polars as pl

from schemas.errors import UserError
from stages.contract import Context


def refuse_without_trusted(ctx: Context) -> None:
    """Raise UserError where the directions are made of a split that no pair is in."""
    target = ctx.config.conflict.target
    if target != "train" and ctx.scan("pairs").filter(pl.col("split") == target).head(1).collect().is_empty():
        raise no_trusted(f"No pair is in the {target} split", target)


def no_trusted(what: str, target: str) -> UserError:
    """The error of directions without a pair. what: the cause."""
    return UserError(
        f"{what}, and these make the directions",
        where=f"conflict.target: {target}",
        fix="Give trusted pairs (pairs.sources[].split: dev, before the sources with the same rows, or pairs.dev_fraction), or set conflict.target: train.",
    )
