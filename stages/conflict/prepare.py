"""What the conflict stage and `explain` start from: the pairs that have a gradient, their languages, weights and groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from schemas.errors import UserError
from schemas.ids import seed_for
from stages.conflict.groups import Groups, leaving_together
from stages.conflict.metric import fit_metric
from stages.conflict.store import Store
from stages.conflict.stream import Chunks, Columns, as_slice, on_device, scaled
from stages.conflict.table import log_ratios
from stages.contract import Context
from stages.gradients.omegas import ema_omegas, mean_omegas
from stages.gradients.trusted import no_trusted
from stages.gradients.weights import PairWeights, pair_weights
from stages.surgery.methods import Surgery, surgery


@dataclass(frozen=True)
class Prepared:
    """Pairs in the store's order. languages: those with a pair; blocks: sketch columns of each layer group.

    weights: c_i and the sides' weights; omega_N: omega_i, which sum to one in a language, 0 for pairs that are in no direction (`conflict.target`);
    groups: pairs that leave together.
    """

    ctx: Context
    store: Store
    languages: list[str]
    language_N: Tensor
    weights: PairWeights
    omega_N: Tensor
    groups: Groups
    blocks: dict[str, Columns]

    @classmethod
    def of(cls, ctx: Context) -> Prepared:
        """Raises UserError for sketches that cannot be compared."""
        config, store = ctx.config.conflict, Store.open(ctx)
        present = set(store.frame["language"])
        languages = [code for code in ctx.config.languages.seen if code in present]
        index = {code: n for n, code in enumerate(languages)}
        language_N = torch.tensor([index[code] for code in store.frame["language"]], dtype=torch.int64)
        in_n = torch.tensor((store.frame["split"] == config.target).to_list()).nonzero()[:, 0]
        if not len(in_n):
            raise no_trusted(f"No pair of the {config.target} split has a gradient", config.target)
        omega_N = torch.zeros(len(language_N), dtype=torch.float64)
        if config.direction == "ema":
            omega_N[in_n] = ema_omegas(language_N[in_n], len(languages), config.ema_gamma, config.ema_batch)
        else:
            omega_N[in_n] = mean_omegas(language_N[in_n], len(languages))
        blocks = store.layout.group_columns("block").items()
        return cls(
            ctx=ctx,
            store=store,
            languages=languages,
            language_N=language_N,
            weights=_weights(ctx, store.frame),
            omega_N=omega_N,
            groups=leaving_together(store.frame, config.leave_out if config.target == "train" else "pair"),
            blocks={name: as_slice(columns) for name, columns in blocks},
        )

    @property
    def count_L(self) -> Tensor:
        """Pairs in each language's direction."""
        return torch.bincount(self.language_N[self.omega_N > 0], minlength=len(self.languages))

    @property
    def read_before(self) -> int:
        """Sketches that `chunks` reads to fit the metric."""
        if self.ctx.config.conflict.metric not in ("coordinate", "layer"):
            return 0
        return sum(int(self.store.kept_M[window.start : window.stop].sum()) for window in self.store.windows)

    def chunks(
        self, advance: Callable[[int], None] = lambda rows: None, device: torch.device | None = None
    ) -> tuple[Chunks, Tensor | None]:
        """(rows, scale_D): the gradients g_i = scale_D * row, in the metric of the run and with their weights, on `device` (None: the CPU); None: the rows.
        Raises UserError where the loss needs what was not stored."""
        config, (weight_N, sides_N2) = self.ctx.config.conflict, self.weights
        chunks = on_device(self.store.chunks(advance, sides_N2=sides_N2), device)
        sample = on_device(self.store.chunks(advance, sides_N2=sides_N2, windows=self.store.windows), device)
        kind = "none" if config.metric == "raw" else config.metric
        layers = [slot.columns for slot in self.store.layout.layers]
        metric = fit_metric(sample, kind, q=config.metric_power, layers=layers)
        return scaled(metric.stream(chunks), weight_N), metric.scale_D


def surgery_of(ctx: Context, languages: Sequence[str]) -> Surgery:
    """The run's surgery over its languages. Raises UserError when it is unknown, its solver is missing, or it takes no weights."""
    config, seed = ctx.config.conflict, seed_for(ctx.config.seed, ctx.round, "surgery")
    weight_L = [config.language_weights.get(code, 1.0) for code in languages] if config.language_weights else None
    try:
        return surgery(config.surgery, len(languages), seed, config.orders, weight_L)
    except (ValueError, ImportError) as error:
        weighs = weight_L is not None and isinstance(error, ValueError)
        raise UserError(str(error), where="conflict.language_weights" if weighs else "conflict.surgery") from error


def _weights(ctx: Context, frame: pl.DataFrame) -> PairWeights:
    """Those of the run's loss, or ones."""
    if ctx.config.conflict.weighting == "none":
        return PairWeights(torch.ones(frame.height, dtype=torch.float64), None)
    chosen, rejected = log_ratios(ctx.config.loss.reference_free)
    columns = frame.select(chosen=chosen, rejected=rejected, n_chosen="n_chosen", n_rejected="n_rejected")
    return pair_weights(ctx.config.loss, *(torch.from_numpy(column.to_numpy().copy()) for column in columns))
