"""Where conflict's numbers come from: stored sketches, or inner products of gradients that were never stored. One algorithm reads both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import polars as pl
import torch
from torch import Tensor

from schemas.ids import seed_for
from stages.conflict.directions import count_conflicts, grams, signed_directions
from stages.conflict.gate import Gate
from stages.conflict.groups import leaving_together
from stages.conflict.null import Sample
from stages.conflict.prepare import Prepared
from stages.conflict.products import ProductStore
from stages.conflict.scores import PairScores
from stages.conflict.scoring import WAITING_BYTES, score_products, score_sketches
from stages.conflict.stream import Columns
from stages.conflict.waiting import Waiting
from stages.contract import Context
from stages.models.device import device_of
from stages.surgery.methods import Surgery


@dataclass(frozen=True)
class Measured:
    """directions_LD: G, float64. negative_SL: share of negative cosines between halves of one language in each scope, NaN where not known; stats:
    of the nulls; notes: about them."""

    directions_LD: Tensor
    negative_SL: Tensor
    stats: Mapping[str, float]
    notes: Sequence[str] = ()


class GradientSource(Protocol):
    """N pairs in the table's order, their languages, what they count, and two passes: `measure`, then `score`. Close it.

    gate: pairs of the table that are not among the N.
    """

    frame: pl.DataFrame
    languages: Sequence[str]
    count_L: Tensor
    weight_N: Tensor
    blocks: Mapping[str, Columns]
    gate: Gate

    def notes(self) -> list[str]:
        """What is said before the work."""
        ...

    def measure(self, scopes: Mapping[str, Columns]) -> Measured:
        """The directions, and what noise alone would do."""
        ...

    def score(self, directions_LD: Tensor, columns: Sequence[Columns], method: Surgery) -> PairScores:
        """Every pair's scores, surgery on each of `columns` apart. Close them."""
        ...

    def close(self) -> None:
        """Give back what the passes put aside."""
        ...


def open_source(ctx: Context) -> GradientSource:
    """Raises UserError for gradients that cannot be compared, or when there is none."""
    return ProductSource(ctx) if "sums" in ctx.inputs else SketchSource(ctx)


class SketchSource:
    """Sketches of the gradients, read twice (`Prepared`)."""

    def __init__(self, ctx: Context) -> None:
        self._ctx, self._ready = ctx, Prepared.of(ctx)
        ready = self._ready
        self.frame, self.gate = ready.store.frame, ready.store.gate
        self.languages: Sequence[str] = ready.languages
        self.blocks: Mapping[str, Columns] = ready.blocks
        self.weight_N = ready.weights.weight_N
        self.count_L = ready.count_L
        ctx.progress.total(2 * self.frame.height + ready.read_before, "sketches")
        self._chunks, self._scale_D = ready.chunks(ctx.progress.advance, device_of(ctx.config))
        labels_N = ready.groups.label_N
        self._labels_N = torch.arange(self.frame.height) if labels_N is None else labels_N
        self._waiting = Waiting(self._labels_N, WAITING_BYTES, ctx.scratch)

    def notes(self) -> list[str]:
        """See GradientSource."""
        return self._ready.groups.notes()

    def measure(self, scopes: Mapping[str, Columns]) -> Measured:
        """See GradientSource."""
        ready, n_languages = self._ready, len(self.languages)
        groups = ready.groups
        sharing_N = self._labels_N if groups.label_N is not None else leaving_together(self.frame, "answers").label_N
        assert sharing_N is not None
        seed = seed_for(self._ctx.config.seed, self._ctx.round, "null")
        dim = ready.store.layout.dim
        sample = Sample.draw(ready.language_N, sharing_N, ready.omega_N, n_languages, dim, seed)
        directions_LD, sums_RLD = signed_directions(
            self._chunks,
            ready.language_N,
            ready.omega_N,
            n_languages,
            sample.sign_Rn,
            sample.rows_n,
            scale_D=self._scale_D,
            keep=self._waiting.put,
        )
        assert sums_RLD is not None
        flips, halves = sample.nulls(sums_RLD, directions_LD, list(scopes.values()))
        found = count_conflicts(directions_LD @ directions_LD.T)
        stats = {
            "conflicts_p_value": flips.tail([found])[0],
            "null_pairs": float(len(sample.rows_n)),
            "null_draws": float(len(sample.flip_Rn)),
            "null_noise_error": sample.error,
            "common_answer_pairs": float(groups.common),
            "largest_group": float(groups.largest),
        }
        notes = []
        if not sample.complete:
            notes.append(
                f"nulls from {len(sample.rows_n):,} of {self.frame.height:,} pairs: the noise of half a language is right to "
                f"{sample.error:.1%} or better (one standard error)"
            )
        return Measured(directions_LD, halves.negative_rate(), stats, notes)

    def score(self, directions_LD: Tensor, columns: Sequence[Columns], method: Surgery) -> PairScores:
        """See GradientSource."""
        return score_sketches(
            self._chunks,
            self._ready.language_N,
            self._ready.omega_N,
            directions_LD,
            method,
            columns=columns,
            scale_D=self._scale_D,
            refit=self._ctx.config.conflict.refit,
            count_L=self.count_L,
            scratch_folder=self._ctx.scratch,
            waiting=self._waiting,
            advance=self._ctx.progress.advance,
        )

    def close(self) -> None:
        """See GradientSource."""
        self._waiting.close()


class ProductSource:
    """Inner products with the directions that the first pass of `sketch.method: one_sided` made (`ProductStore`). Every pair leaves alone;
    what noise alone would do is not known."""

    def __init__(self, ctx: Context) -> None:
        self._ctx, self._store = ctx, ProductStore.open(ctx)
        store = self._store
        self.frame, self.gate = store.frame, store.gate
        self.languages: Sequence[str] = store.languages
        self.blocks: Mapping[str, Columns] = store.blocks
        self.weight_N, self.count_L = store.weight_N, store.count_L

    def notes(self) -> list[str]:
        """See GradientSource."""
        shared = leaving_together(self.frame, "answers").shared
        if not shared:
            return []
        return [
            f"{shared} of {self.frame.height} pairs share an answer with others, which stay in the "
            "directions they are compared with: one-sided sketches cannot take them out (conflict.leave_out: pair)"
        ]

    def measure(self, scopes: Mapping[str, Columns]) -> Measured:
        """See GradientSource."""
        unknown_SL = torch.full((len(scopes), len(self.languages)), torch.nan)
        return Measured(self._store.directions_LD, unknown_SL, {})

    def score(self, directions_LD: Tensor, columns: Sequence[Columns], method: Surgery) -> PairScores:
        """See GradientSource."""
        return score_products(
            self._store.chunks(),
            self._store.language_N,
            self._store.omega_N,
            grams(directions_LD, columns),
            method,
            count_L=self.count_L,
            refit=self._ctx.config.conflict.refit,
            scratch_folder=self._ctx.scratch,
        )

    def close(self) -> None:
        """Nothing was put aside."""
