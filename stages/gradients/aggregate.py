"""Aggregate: the first pass of one-sided compression (ConGrad's form; docs/methods.md sections 3 and 4).

A Flora sketch of one pair has millions of numbers, so none is stored: every part keeps the weighted sum of its pairs'
sketches in each language, and a row per pair with its weights. The gradients stage then streams over the pairs again
and compares each with the directions these sums make.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from schemas.config.curation import ConflictConfig
from schemas.config.loss import LossConfig
from schemas.tables import TABLES
from stages.contract import Context, Drop, Part, Shard, ShardStage
from stages.gradients.cuts import COLUMNS, Cut, cuts, notes, relevant
from stages.gradients.items import Item, finite_pairs, sound
from stages.gradients.omegas import ema_omegas
from stages.gradients.pair_sketches import PairSketches
from stages.gradients.projections import SketchLayout
from stages.gradients.relevance import relevance_columns
from stages.gradients.stage import Worker, sketch_shards
from stages.gradients.sums import sums_key
from stages.gradients.weights import pair_weights


class Aggregate(ShardStage):
    """pairs -> contributions, sums. Unit `pair`: the train split's pairs; drops and failures as in gradients."""

    def run(self, ctx: Context, shards: Iterator[Shard]) -> Iterator[Part]:
        """See ShardStage.run. Raises UserError for models that cannot be sketched."""
        yield from sketch_shards(ctx, shards, AggregateWorker)


class AggregateWorker(Worker):
    """Sums a shard's pairs by language.

    A pair that the relevance gate holds back is in no sum and has its row all the same. The cuts are those of a sample of all pairs, which every
    worker looks at before its first part: a sum cannot be taken back, and no part sees enough pairs. Pairs may fail while they are summed. The mean only counts those that did not; an EMA's minibatches are cut without
    them, so that the part is summed again then.
    """

    def _products(self) -> None:
        return None

    def _tables(self, shard: Shard, items: list[Item], drops: list[Drop]) -> dict[str, pa.Table]:
        config = self.ctx.config
        items = self._refer(items, drops) if items else items  # they weight the sums, so they come first
        items, held = self._gated(items)
        again = self._sketched_again(shard, items, config.gradients.aggregate_size) if items else {}
        while items:
            summing = PartSums(self.sketcher.layout, config.conflict, config.loss, items, self.reference is not None)
            name = f"sums of {len(items)}"
            summing.restore(self.unfinished.keep(name, summing.state), self._memo(name, items).known)
            got, fitting = self._sketched(items, drops, summing.reduce, name)
            left = sound(fitting, finite_pairs(got), got.sketch_ND[:, 0], drops)
            whole = len(left) == len(items)
            items = left
            if whole or config.conflict.direction == "mean":
                break
        rows, sums = [held_rows(shard.index, held)], TABLES["sums"].schema.empty_table()
        if items:
            self._measure_error(self._sketched_once_more(again, items), again)
            rows.insert(0, summing.contributions(shard.index, items, got.rows([item.at for item in items])))
            sums = summing.sums(shard.index, items, sums_key(self.metadata, config.conflict))
        return {"contributions": pa.concat_tables(rows), "sums": sums}

    def _gated(self, items: list[Item]) -> tuple[list[Item], list[Item]]:
        """(pairs that go into the sums, those that the gate holds back), all with their relevance."""
        if self.relevance is None:
            return items, []
        sample = self._sample
        new = [item for item in items if item.pair_id not in sample]
        self.relevance.measure(new, did=self._worked)
        for item in items:
            if (known := sample.get(item.pair_id)) is not None:
                item.relevance, item.null = known.relevance, known.null
        frame = _relevance_frame(items)
        for item, passes in zip(items, relevant(frame, self._cuts), strict=True):
            item.relevant = passes
        return [item for item in items if item.relevant], [item for item in items if not item.relevant]

    @cached_property
    def _sample(self) -> dict[str, Item]:
        """The pairs that are looked at under another prompt too, measured."""
        assert self.relevance is not None
        wanted = self.ctx.scan("pairs").filter(pl.col("pair_id").is_in(sorted(self.relevance.others)))
        rows = wanted.sort("pair_id").collect().to_dicts()
        items = [item for row in rows if (item := self._item(row, [])) is not None]
        self.relevance.measure(items)
        return {item.pair_id: item for item in items}

    @cached_property
    def _cuts(self) -> list[Cut]:
        config = self.ctx.config
        trained = self.ctx.scan("pairs").filter(pl.col("split") == "train")
        languages = sorted(trained.select("language").unique().collect()["language"])
        sample = _relevance_frame(list(self._sample.values()))
        found = cuts(sample, languages, config.conflict.relevance)
        for note in notes(found):
            self.ctx.progress.note(note)
        return found

    def _sketched_once_more(self, again: Mapping[str, Tensor], items: list[Item]) -> dict[str, Tensor]:
        """Sketches of the pairs whose error is measured: a sum keeps none."""
        sample = [item for item in items if item.pair_id in again]
        if not sample:
            return {}
        got = self.sketcher.run([item.pair for item in sample], self.budget).sketch_ND
        return dict(zip((item.pair_id for item in sample), got, strict=True))

    def _cost(self, items: list[Item], own: bool = True) -> int:
        total = super()._cost(items, own)
        if self.relevance is not None:  # those of the sample were measured before the first part
            total -= self.relevance.cost([item for item in items if item.pair_id in self.relevance.others], own)
        return total


@dataclass
class PartSums:
    """The weighted sums of one part while its batches come in.

    items [N]: in the order they are given to the pass; referred: whether their references are another model's, not the
    policy's own.
    """

    layout: SketchLayout
    config: ConflictConfig
    loss: LossConfig
    items: list[Item]
    referred: bool
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _added: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        index = {code: n for n, code in enumerate(dict.fromkeys(item.language for item in self.items))}
        language_N = torch.tensor([index[item.language] for item in self.items], dtype=torch.int64)
        self.omega_N = torch.ones(len(self.items), dtype=torch.float64)
        if self.config.direction == "ema":
            self.omega_N = ema_omegas(language_N, len(index), self.config.ema_gamma, self.config.ema_batch)

    def reduce(self, indices: list[int], got: PairSketches) -> PairSketches:
        """Add a batch; returns it with sketch_ND [N, 2] = (norm, loss weight), not finite where the pair failed.

        A batch that ran out of memory half way comes again in pieces: what was added is not added twice.
        """
        norm_N = torch.linalg.vector_norm(got.sketch_ND, dim=1, dtype=torch.float64)
        weight_N = self._weights(indices, got)
        for row, i in enumerate(indices):
            norm, weight = float(norm_N[row]), float(weight_N[row])
            if i in self._added or not math.isfinite(norm + weight) or norm == 0.0:
                continue
            factor = float(self.omega_N[i]) * weight / (norm if self.config.metric == "unit" else 1.0)
            wide_D = got.sketch_ND[row].to(torch.float64)
            language = self.items[i].language
            if language not in self._sums:
                self._sums[language] = torch.zeros(self.layout.dim, dtype=torch.float64)
            self._sums[language].add_(wide_D, alpha=factor)
            self._added.add(i)
        return PairSketches(torch.stack([norm_N, weight_N], dim=1), got.logp_chosen_N, got.logp_rejected_N)

    def state(self) -> dict[str, Tensor]:
        """The sums so far, by language."""
        return self._sums

    def restore(self, state: Mapping[str, Tensor], added: Iterable[int]) -> None:
        """Go on from the sums of the pairs that were `added` to them."""
        self._sums.update(state)
        self._added.update(added)

    def contributions(self, part: int, items: list[Item], got: PairSketches) -> pa.Table:
        """Rows of the pairs that did not fail; `got` is what `reduce` made of them, in this order."""
        total = self._totals(items)
        own_N2 = torch.stack([got.logp_chosen_N, got.logp_rejected_N], dim=1)
        references_N2 = self._referred(items) if self.referred else own_N2
        columns = {
            "pair_id": [item.pair_id for item in items],
            "language": [item.language for item in items],
            "part": [part] * len(items),
            "omega": [float(self.omega_N[item.given]) / total[item.language] for item in items],
            "weight": got.sketch_ND[:, 1].numpy(),
            "norm": got.sketch_ND[:, 0].numpy(),
            "ref_logp_chosen": references_N2[:, 0].float().numpy(),
            "ref_logp_rejected": references_N2[:, 1].float().numpy(),
            **relevance_columns(items),
            "relevant": [True] * len(items),
        }
        return pa.table(columns, schema=TABLES["contributions"].schema)

    def sums(self, part: int, items: list[Item], key: str) -> pa.Table:
        """A row per language and layer."""
        rows, totals = [], self._totals(items)
        for language, total in totals.items():
            count = sum(item.language == language for item in items)
            batches = math.ceil(count / self.config.ema_batch) if self.config.direction == "ema" else 1
            sum_D = self._sums.get(language, torch.zeros(self.layout.dim, dtype=torch.float64)) / total
            for slot in self.layout.layers:
                values = sum_D[slot.columns].to(torch.float32).numpy()
                row = {"part": part, "language": language, "layer": slot.name, "key": key}
                rows.append({**row, "n_pairs": count, "n_batches": batches, "values": values})
        return pa.Table.from_pylist(rows, schema=TABLES["sums"].schema)

    @staticmethod
    def _referred(items: list[Item]) -> Tensor:
        return torch.tensor([item.reference for item in items], dtype=torch.float64)

    def _weights(self, indices: list[int], got: PairSketches) -> Tensor:
        """c_i [N] of the run's loss, or ones; not a number where a log-probability is not finite."""
        logp_N2 = torch.stack([got.logp_chosen_N, got.logp_rejected_N], dim=1)
        items = [self.items[i] for i in indices]
        references_N2 = self._referred(items).to(logp_N2.dtype) if self.referred else logp_N2
        good_N = torch.isfinite(logp_N2).all(dim=1) & torch.isfinite(references_N2).all(dim=1)
        weight_N = torch.full((len(indices),), float("nan"), dtype=torch.float64)
        if self.config.weighting == "none":
            return torch.where(good_N, 1.0, weight_N)
        ratio_N2 = (logp_N2.to(torch.float64) - references_N2.to(torch.float64))[good_N]
        counts_2N = [[len(getattr(item.pair, side)) for item in items] for side in ("chosen", "rejected")]
        n_chosen_N, n_rejected_N = (torch.tensor(counts)[good_N] for counts in counts_2N)
        got_weights = pair_weights(self.loss, ratio_N2[:, 0], ratio_N2[:, 1], n_chosen_N, n_rejected_N)
        if got_weights.sides_N2 is not None:
            raise ValueError(
                f"loss {self.loss.type} weighs chosen and rejected apart: one_sided keeps their difference only"
            )
        weight_N[good_N] = got_weights.weight_N
        return weight_N

    def _totals(self, items: list[Item]) -> dict[str, float]:
        """language -> sum of the weights of its pairs: those of an EMA sum to 1 already."""
        found: dict[str, float] = {}
        for item in items:
            found[item.language] = found.get(item.language, 0.0) + float(self.omega_N[item.given])
        return found


def held_rows(part: int, items: list[Item]) -> pa.Table:
    """Rows of pairs that are in no sum: what they count there is 0, as their norm and weight, which nothing has made."""
    zeros = [0.0] * len(items)
    columns = {
        "pair_id": [item.pair_id for item in items],
        "language": [item.language for item in items],
        "part": [part] * len(items),
        "omega": zeros,
        "weight": zeros,
        "norm": zeros,
        "ref_logp_chosen": [item.reference[0] for item in items],
        "ref_logp_rejected": [item.reference[1] for item in items],
        **relevance_columns(items),
        "relevant": [False] * len(items),
    }
    return pa.table(columns, schema=TABLES["contributions"].schema)


def _relevance_frame(items: list[Item]) -> pl.DataFrame:
    """language and the relevance of items, in the precision they are stored in."""
    values = pl.DataFrame(relevance_columns(items), schema=dict.fromkeys(COLUMNS, pl.Float32))
    return values.insert_column(0, pl.Series("language", [item.language for item in items], pl.String))
