"""Gradients: one compressed DPO gradient per training pair (docs/methods.md sections 2 and 3)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from schemas.config import RunConfig
from schemas.errors import UserError
from schemas.ids import seed_for
from schemas.tables import gradients_schema
from stages.contract import Context, Drop, Part, Shard, ShardStage, tally
from stages.gradients.batching import TokenBudget
from stages.gradients.error import cosine_error, first_training_row
from stages.gradients.items import Item, finite_pairs, numbered, sound, without_misfits
from stages.gradients.layers import select_layers
from stages.gradients.logprobs import check_head, logprobs_of_rows
from stages.gradients.pair_sketches import PairSketches, Sketched
from stages.gradients.preconditioner import factors_of
from stages.gradients.products import Products
from stages.gradients.projections import SketchLayout
from stages.gradients.relevance import Relevance, relevance_columns
from stages.gradients.rows import Pair
from stages.gradients.sketcher import Sketcher, Unsketchable
from stages.gradients.store import sketch_columns, store_metadata
from stages.gradients.trusted import refuse_without_trusted
from stages.gradients.unfinished import Pass, Unfinished
from stages.gradients.work import Work, forward_cost, pair_tokens, sketch_cost
from stages.models.device import device_of, dtype_of, refuse_float16
from stages.models.load import load_text_model, load_with_adapter, settle_threads
from stages.text.render import Renderer, RenderError, load_renderer

Reduce = Callable[[list[int], PairSketches], PairSketches]
"""See `Sketcher.run`."""


class Gradients(ShardStage):
    """pairs -> gradients. `sketch.method: one_sided`: with contributions and sums, the second of its two passes.

    Unit `pair`: the pairs of the train split, with `conflict.target: dev` of the dev split too; others are held out and not input. Dropped: too_long, identical (the answers
    are the same tokens: the gradient is nothing but rounding), zero_gradient. Failed: cannot_render,
    non_finite_gradient, out_of_memory (a pair that does not fit alone; a batch that does not fit is halved),
    not_aggregated (one_sided: it failed in the first pass).
    In reference mode every pair is a batch of its own, so that no bit depends on the batching.
    """

    def run(self, ctx: Context, shards: Iterator[Shard]) -> Iterator[Part]:
        """See ShardStage.run. Raises UserError for models that cannot be sketched, and where no pair is trusted that should be."""
        refuse_without_trusted(ctx)
        yield from sketch_shards(ctx, shards, Worker)


def sketch_shards(ctx: Context, shards: Iterator[Shard], kind: type[Worker]) -> Iterator[Part]:
    """Load what the shards need once and give each to a worker of this kind. Raises UserError for models that cannot
    be sketched."""
    config = ctx.config
    settle_threads(config)
    renderer = load_renderer(ctx.models["policy"], config.text, config.model.trust_remote_code)
    of = config.gradients.of
    policy = _load(ctx, "policy", load_text_model if of == "weights" else load_with_adapter)
    sketch = config.gradients.sketch
    known = sketch.method == "one_sided" and kind is Worker  # by the first pass
    reference = None if known or _is_same(ctx) else _load(ctx, "reference")
    with ExitStack() as entered:
        try:
            check_head(policy)
            coverage = select_layers(policy, sketch.include, sketch.exclude, of)
            layout = SketchLayout.plan(coverage.layers, sketch.dim, sketch.method, sketch.rank)
            factors, digest = factors_of(ctx)
            sketcher = entered.enter_context(
                Sketcher(
                    policy,
                    layout,
                    sketch.seed,
                    both_sides=sketch.both_sides,
                    scales=factors,
                    prefix_sharing=shares_prefixes(config),
                    of=of,
                )
            )
        except ValueError as error:
            raise _refusal(ctx, error) from error
        ctx.progress.note(coverage.summary())
        if sketcher.sharing_note:
            ctx.progress.note(sketcher.sharing_note)
        worker = kind(ctx, renderer, sketcher, reference, digest)
        for shard in shards:
            try:
                part = worker.part(shard)
            except Unsketchable as error:  # any other error of a part is no word about the model
                raise _refusal(ctx, error) from error
            yield part


def _refusal(ctx: Context, error: ValueError) -> UserError:
    return UserError(
        f"The gradients of {ctx.models['policy'].name} cannot be sketched: {error}",
        where="gradients.sketch",
        fix="Exclude the named layers with gradients.sketch.exclude, or use another model.",
    )


def _load(ctx: Context, role: str, load: Callable[..., Any] = load_text_model) -> Any:
    config = ctx.config
    refuse_float16(config)
    return load(ctx.models[role], dtype_of(config), device_of(config), config.model.trust_remote_code)


def _is_same(ctx: Context) -> bool:
    """Whether the reference is the policy: then Delta = 0 and no reference pass is needed."""
    return ctx.models["reference"].digest == ctx.models["policy"].digest


def shares_prefixes(config: RunConfig) -> bool:
    """Whether prompts are computed once where the model allows it; never in reference mode."""
    return config.gradients.prefix_sharing == "auto" and not config.execution.deterministic


@dataclass
class Worker:
    """Turns shards into parts of the gradients table. factors: hash of the preconditioner, empty without one."""

    ctx: Context
    renderer: Renderer
    sketcher: Sketcher
    reference: Any | None
    factors: str = ""

    def __post_init__(self) -> None:
        layout, model = self.sketcher.layout, self.ctx.models["policy"].digest
        self.metadata = store_metadata(layout, self.sketcher.seed, model, self.factors)
        self.products = self._products()
        self.stats: dict[str, float] = {}
        self.first_row: int | None = None
        self.budget = TokenBudget.of_gradients(self.ctx)
        self.begun = time.monotonic()
        self.tokens = 0
        self.relevance = self._relevance()

    def part(self, shard: Shard) -> Part:
        """Sketch a shard's training pairs."""
        rows = [row for row in shard.rows.to_pylist() if row["split"] in self.ctx.config.conflict.splits]
        drops: list[Drop] = []
        items = [item for row in rows if (item := self._item(row, drops)) is not None]
        self.work = Work(len(rows), self._cost(items))
        before, backoffs = self.tokens, self.budget.backoffs
        self.stats, self.tokens_before = {}, 0
        self.unfinished = Unfinished.of(self.ctx, shard.index)
        tables = self._tables(shard, items, drops)
        self.ctx.progress.advance(self.work.finish())
        return Part(
            index=shard.index,
            tables=tables,
            tallies=tally("pair", [row["language"] for row in rows], drops),
            drops=drops,
            stats={
                "tokens": float(self.tokens - before + self.tokens_before),
                "memory_backoffs": float(self.budget.backoffs - backoffs),
                **self.stats,
            },
            seconds_before=self.unfinished.seconds,
        )

    def _item(self, row: dict[str, Any], drops: list[Drop]) -> Item | None:
        """A row with its token ids; None, and a drop, for one that is not sketched."""
        limit = self.ctx.config.text.max_length
        try:
            item = Item(row, self.renderer.pair_ids(row["prompt"], row["chosen"], row["rejected"]))
        except RenderError as error:
            drops.append(Drop("pair", row["pair_id"], row["language"], "cannot_render", str(error), failed=True))
            return None
        if item.pair.chosen == item.pair.rejected:
            drops.append(item.dropped("identical", "both answers are the same tokens"))
            return None
        if item.pair.longest > limit:
            drops.append(item.dropped("too_long", f"{item.pair.longest} tokens > {limit}"))
            return None
        return item

    def _products(self) -> Products | None:
        """What the second pass of one_sided compares with."""
        return (
            Products.open(self.ctx, self.metadata) if self.ctx.config.gradients.sketch.method == "one_sided" else None
        )

    def _relevance(self) -> Relevance | None:
        """None where it is not measured, or was in the first pass."""
        if self.products is not None:
            return None
        return Relevance.of(self.ctx, self.sketcher.model, self.renderer, self.budget)

    def _tables(self, shard: Shard, items: list[Item], drops: list[Drop]) -> dict[str, pa.Table]:
        """The part's tables; pairs that fail are added to `drops`."""
        if self.products is not None:
            items = self.products.known(items, drops)
        if not items:
            return {"gradients": self._empty()}
        again = (
            self._sketched_again(shard, items, self.ctx.config.gradients.shard_size) if self.products is None else {}
        )
        got, items = self._sketched(items, drops, reduce=None if self.products is None else self.products.reduce)
        if self.products is None:
            items = self._refer(items, drops, got)
        elif _is_same(self.ctx):
            _own_reference(items, got)
        finite_N = finite_pairs(got) & torch.isfinite(got.logp_chosen_N) & torch.isfinite(got.logp_rejected_N)
        for item in items:
            finite_N[item.at] &= math.isfinite(sum(item.reference))
        items = sound(items, finite_N, torch.linalg.vector_norm(got.sketch_ND, dim=1, dtype=torch.float64), drops)
        if not items:
            return {"gradients": self._empty()}
        got = got.rows([item.at for item in items])
        if self.relevance is not None:
            sums_N2 = torch.stack([got.logp_chosen_N, got.logp_rejected_N], dim=1).tolist()
            self.relevance.measure(items, sums_N2, self._worked)
        self._measure_error({item.pair_id: got.sketch_ND[n] for n, item in enumerate(items)}, again)
        return {"gradients": pa.table(self._columns(items, got), schema=self._schema())}

    def _sketched(
        self,
        items: list[Item],
        drops: list[Drop],
        reduce: Reduce | None = None,
        name: str = "sketches",
    ) -> tuple[PairSketches, list[Item]]:
        """Sketches, and the items that have them at their place `at`. name: of the pass, by which its results are remembered."""
        misfits: list[int] = []
        memo = self._memo(name, items)
        if memo.known:
            known = [items[i].pair for i in memo.known]
            self.tokens_before = sum(map(pair_tokens, known))
            self._worked(sum(sketch_cost(pair, self.sketcher.sharing) for pair in known))
        got = self.sketcher.run(numbered(items), self.budget, self._report, misfits, reduce, memo)
        return got, without_misfits(items, misfits, drops)

    def _refer(self, items: list[Item], drops: list[Drop], got: PairSketches | None = None) -> list[Item]:
        """Give items their log-probabilities under the reference: what the policy gave (got) when they are the same model.
        What does not fit in memory becomes a drop; places in `got` stay."""
        if self.reference is None:
            if got is not None:
                _own_reference(items, got)
            return items
        unfit: list[int] = []
        rows = [side for item in items for side in item.pair.rows]
        ids = [f"{item.pair_id} {side}" for item in items for side in ("chosen", "rejected")]
        memo = Pass(
            self.unfinished,
            "reference",
            ids,
            lambda values_T: {"sum": values_T.double().sum()},
            lambda row: row["sum"],
        )

        def done(computed: list[int]) -> None:
            self._worked(forward_cost([rows[n] for n in computed]))

        self._worked(forward_cost([rows[n] for n in memo.known]))
        found = iter(logprobs_of_rows(self.reference, rows, self.budget, misfits=unfit, memo=memo, done=done))
        sums = [float("nan") if n in unfit else float(next(found).double().sum()) for n in range(len(rows))]
        for n, item in enumerate(items):
            item.reference = (sums[2 * n], sums[2 * n + 1])
        places = [item.at for item in items]
        numbered(items)
        left = without_misfits(items, sorted({n // 2 for n in unfit}), drops)
        for item in left:
            item.at = places[item.given]
        return left

    def _columns(self, items: list[Item], got: PairSketches) -> dict[str, Any]:
        """The gradients table of items whose sketches are `got`, in order."""
        reference_N2 = torch.tensor([item.reference for item in items], dtype=torch.float64).float()
        return {
            "pair_id": [item.pair_id for item in items],
            "group_id": [item.row["group_id"] for item in items],
            "language": [item.language for item in items],
            "split": [item.row["split"] for item in items],
            **self._vectors(got),
            "logp_chosen": got.logp_chosen_N.float().numpy(),
            "logp_rejected": got.logp_rejected_N.float().numpy(),
            "ref_logp_chosen": reference_N2[:, 0].numpy(),
            "ref_logp_rejected": reference_N2[:, 1].numpy(),
            "n_prompt": [len(item.ids.prompt) for item in items],
            "n_chosen": [len(item.ids.chosen) for item in items],
            "n_rejected": [len(item.ids.rejected) for item in items],
            "ids_hash": [item.ids.hash() for item in items],
            **relevance_columns(items),
        }

    def _vectors(self, got: PairSketches) -> dict[str, Any]:
        """The columns that hold vectors."""
        if self.products is not None:
            return self.products.columns(got.sketch_ND)
        columns = sketch_columns("", got.sketch_ND)
        if got.chosen_ND is not None and got.rejected_ND is not None:
            columns |= sketch_columns("_chosen", got.chosen_ND) | sketch_columns("_rejected", got.rejected_ND)
        return columns

    def _sketched_again(self, shard: Shard, items: list[Item], size: int) -> dict[str, torch.Tensor]:
        """On the shard (of `size` rows) that has the first training pair: sketches of some pairs with another seed, by pair id.

        Before the pairs themselves, which are progress: this work is none, and would spoil what is said of the time left.
        """
        config, sketcher = self.ctx.config, self.sketcher
        count = min(config.gradients.sketch.error_pairs, len(items))
        if count < 2 or config.gradients.sketch.method == "exact":
            return {}
        if self.first_row is None:
            self.first_row = first_training_row(self.ctx)
        if self.first_row // size != shard.index:
            return {}
        seeds = [seed_for(config.seed, "sketch error", item.pair_id) for item in items]
        order = sorted(range(len(items)), key=lambda n: (seeds[n], n))[:count]
        sample, misfits = [items[n] for n in order], list[int]()
        second = Sketcher(
            sketcher.model,
            sketcher.layout,
            seed_for(sketcher.seed, "second seed"),
            scales=sketcher.scales,
            prefix_sharing=sketcher.sharing,
            of=sketcher.of,
        )
        with second:
            again_ND = second.run([item.pair for item in sample], self.budget, misfits=misfits).sketch_ND
        fitting = (item.pair_id for k, item in enumerate(sample) if k not in misfits)
        return dict(zip(fitting, again_ND, strict=True))

    def _measure_error(self, first: Mapping[str, torch.Tensor], again: Mapping[str, torch.Tensor]) -> None:
        """Compare cosines of the pairs that have a sketch with either seed."""
        both = [pair_id for pair_id in again if pair_id in first]
        if both:
            self.stats |= cosine_error(torch.stack([first[p] for p in both]), torch.stack([again[p] for p in both]))

    def _memo(self, name: str, items: list[Item]) -> Pass[Sketched]:
        return Pass(
            self.unfinished,
            name,
            [item.pair_id for item in items],
            lambda sketched: sketched[0].row(sketched[1]),
            lambda row: (PairSketches.of_row(row), 0),
            self.sketcher.settle,
        )

    def _cost(self, items: list[Item], own: bool = False) -> int:
        """Of all passes over a shard's items. own: the relevance pass computes the answers under their prompt itself."""
        total = sum(sketch_cost(item.pair, self.sketcher.sharing) for item in items)
        if self.reference is not None and self.products is None:
            total += sum(pair_tokens(item.pair) for item in items)
        return total + (self.relevance.cost(items, own) if self.relevance is not None else 0)

    def _report(self, batch: list[Pair]) -> None:
        self.tokens += sum(map(pair_tokens, batch))
        rate = self.tokens / max(time.monotonic() - self.begun, 1e-9)
        self._worked(sum(sketch_cost(pair, self.sketcher.sharing) for pair in batch), tokens_per_s=rate)

    def _worked(self, cost: int, **rates: float) -> None:
        self.ctx.progress.advance(self.work.did(cost), **rates)

    def _schema(self) -> pa.Schema:
        """The gradients schema with what is needed to read a sketch: layer offsets and the projections' seed."""
        if self.products is not None:
            return self.products.schema
        return gradients_schema(self.sketcher.layout.dim, self.sketcher.both_sides).with_metadata(self.metadata)

    def _empty(self) -> pa.Table:
        return self._schema().empty_table()


def _own_reference(items: list[Item], got: PairSketches) -> None:
    """The reference is the policy."""
    for item in items:
        item.reference = (float(got.logp_chosen_N[item.at]), float(got.logp_rejected_N[item.at]))
