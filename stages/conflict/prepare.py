"""What the conflict stage and `explain` start from: the pairs that have a gradient, their languages, weights and groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from torch import Tensor

from stages.conflict.directions import ema_omegas, mean_omegas
from stages.conflict.groups import merge_groups
from stages.conflict.metric import fit_metric
from stages.conflict.scores import as_slice
from stages.conflict.store import Store
from stages.conflict.stream import Chunks, Columns, scaled
from stages.conflict.table import log_ratios
from stages.conflict.weights import PairWeights, pair_weights
from stages.contract import Context

_COMMON_ANSWER = (20, 0.01)
"""An answer shared by more pairs than both (a number, a share of all) does not join them into one group: "Yes." would
chain unrelated tasks together until nothing is left to compare with."""


@dataclass(frozen=True)
class Prepared:
    """Pairs in the store's order. languages: those with a pair; blocks: sketch columns of each layer group.

    weights: c_i and the sides' weights; omega_N: omega_i, which sum to one in a language; group_N: pairs that leave together, None: alone.
    """

    ctx: Context
    store: Store
    languages: list[str]
    language_N: Tensor
    weights: PairWeights
    omega_N: Tensor
    group_N: Tensor | None
    blocks: dict[str, Columns]

    @classmethod
    def of(cls, ctx: Context) -> Prepared:
        """Raises UserError for sketches that cannot be compared."""
        config, store = ctx.config.conflict, Store.open(ctx)
        present = set(store.frame["language"])
        languages = [code for code in ctx.config.languages.seen if code in present]
        index = {code: n for n, code in enumerate(languages)}
        language_N = torch.tensor([index[code] for code in store.frame["language"]], dtype=torch.int64)
        if config.direction == "ema":
            omega_N = ema_omegas(language_N, len(languages), config.ema_gamma, config.ema_batch)
        else:
            omega_N = mean_omegas(language_N, len(languages))
        blocks = store.layout.group_columns("block").items()
        return cls(
            ctx=ctx,
            store=store,
            languages=languages,
            language_N=language_N,
            weights=_weights(ctx, store.frame),
            omega_N=omega_N,
            group_N=_groups(store.frame) if config.leave_out == "group" else None,
            blocks={name: as_slice(columns) for name, columns in blocks},
        )

    @property
    def passes_before(self) -> int:
        """Passes over the sketches that `chunks` makes to fit the metric."""
        return int(self.ctx.config.conflict.metric in ("coordinate", "layer"))

    def chunks(self, advance: Callable[[int], None] = lambda rows: None) -> Chunks:
        """The gradients g_i, in the metric of the run and with their weights. Raises UserError where the loss needs what was
        not stored."""
        config, (weight_N, sides_N2) = self.ctx.config.conflict, self.weights
        chunks = self.store.chunks(advance) if sides_N2 is None else self.store.sides(sides_N2, advance)
        kind = "none" if config.metric == "raw" else config.metric
        layers = [slot.columns for slot in self.store.layout.layers]
        metric = fit_metric(chunks, kind, q=config.metric_power, layers=layers)
        return scaled(metric.stream(chunks), weight_N)


def _weights(ctx: Context, frame: pl.DataFrame) -> PairWeights:
    """Those of the run's loss, or ones."""
    if ctx.config.conflict.weighting == "none":
        return PairWeights(torch.ones(frame.height, dtype=torch.float64), None)
    chosen, rejected = log_ratios()
    columns = frame.select(chosen=chosen, rejected=rejected, n_chosen="n_chosen", n_rejected="n_rejected")
    return pair_weights(ctx.config.loss, *(torch.from_numpy(column.to_numpy().copy()) for column in columns))


def _groups(frame: pl.DataFrame) -> Tensor:
    """Pairs that share a translation group or an answer text (chosen of one, rejected of another) leave together."""
    n = frame.height
    limit = max(_COMMON_ANSWER[0], int(_COMMON_ANSWER[1] * n))
    texts = np.concatenate([frame["chosen"].to_numpy(), frame["rejected"].to_numpy()])
    _, answers, counts = np.unique(texts, return_inverse=True, return_counts=True)
    answers = np.where(counts[answers] > limit, -1, answers)
    translations = frame["group_id"].rank("dense").to_numpy().astype(np.int64)
    return merge_groups(np.tile(np.arange(n), 2), answers, np.tile(translations, 2))[:n]
