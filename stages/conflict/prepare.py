"""What the conflict stage and `explain` start from: the pairs that have a gradient, their languages, weights and groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from stages.conflict.directions import ema_omegas, loss_weights, mean_omegas
from stages.conflict.groups import leaving_together
from stages.conflict.metric import fit_metric
from stages.conflict.scores import as_slice
from stages.conflict.store import Store
from stages.conflict.stream import Chunks, Columns, scaled
from stages.conflict.table import margin
from stages.contract import Context


@dataclass(frozen=True)
class Prepared:
    """Pairs in the store's order. languages: those with a pair; blocks: sketch columns of each layer group.

    weight_N: c_i; omega_N: omega_i, which sum to one in a language; group_N: pairs that leave together, None: alone.
    """

    ctx: Context
    store: Store
    languages: list[str]
    language_N: Tensor
    weight_N: Tensor
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
            weight_N=_loss_weights(ctx, store.frame),
            omega_N=omega_N,
            group_N=leaving_together(store.frame) if config.leave_out == "group" else None,
            blocks={name: as_slice(columns) for name, columns in blocks},
        )

    @property
    def passes_before(self) -> int:
        """Passes over the sketches that `chunks` makes to fit the metric."""
        return int(self.ctx.config.conflict.metric in ("coordinate", "layer"))

    def chunks(self, advance: Callable[[int], None] = lambda rows: None) -> Chunks:
        """The gradients g_i, in the metric of the run and with their weights."""
        config, chunks = self.ctx.config.conflict, self.store.chunks(advance)
        kind = "none" if config.metric == "raw" else config.metric
        layers = [slot.columns for slot in self.store.layout.layers]
        metric = fit_metric(chunks, kind, q=config.metric_power, layers=layers)
        return scaled(metric.stream(chunks), self.weight_N)


def _loss_weights(ctx: Context, frame: pl.DataFrame) -> Tensor:
    """c_i of the run's loss, or ones."""
    if ctx.config.conflict.weighting == "none":
        return torch.ones(frame.height, dtype=torch.float64)
    delta = frame.select(margin()).to_series()
    n_chosen, n_rejected = (torch.from_numpy(frame[name].to_numpy().copy()) for name in ("n_chosen", "n_rejected"))
    loss = ctx.config.loss
    return loss_weights(torch.from_numpy(delta.to_numpy().copy()), n_chosen, n_rejected, loss.beta, loss.alpha)
