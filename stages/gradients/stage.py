"""Gradients: one compressed DPO gradient per training pair (METHODS.md sections 2 and 3)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
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
from stages.gradients.layers import select_layers
from stages.gradients.logprobs import check_head, score_rows
from stages.gradients.preconditioner import factors_of
from stages.gradients.products import Products
from stages.gradients.projections import SketchLayout
from stages.gradients.rows import Pair
from stages.gradients.sketcher import PairSketches, Sketcher, Unsketchable
from stages.gradients.store import LAYOUT_KEY, SEED_KEY, sketch_columns, store_metadata
from stages.models.device import device_of, dtype_of
from stages.models.load import load_causal_lm, load_with_adapter, settle_threads
from stages.text.render import PairIds, Renderer, RenderError, load_renderer

__all__ = ["LAYOUT_KEY", "SEED_KEY", "Gradients", "Worker", "sketch_shards"]


class Gradients(ShardStage):
    """pairs -> gradients. `sketch.method: one_sided`: with contributions and sums, the second of its two passes.

    Unit `pair`: the train split's pairs; others are held out and not input. Dropped: too_long, identical (the answers
    are the same tokens: the gradient is nothing but rounding). Failed: cannot_render,
    non_finite_gradient, out_of_memory (a pair that does not fit alone; a batch that does not fit is halved),
    not_aggregated (one_sided: it failed in the first pass).
    In reference mode every pair is a batch of its own, so that no bit depends on the batching.
    """

    def run(self, ctx: Context, shards: Iterator[Shard]) -> Iterator[Part]:
        """See ShardStage.run. Raises UserError for models that cannot be sketched."""
        yield from sketch_shards(ctx, shards, Worker)


def sketch_shards(ctx: Context, shards: Iterator[Shard], kind: type[Worker]) -> Iterator[Part]:
    """Load what the shards need once and give each to a worker of this kind. Raises UserError for models that cannot
    be sketched."""
    config = ctx.config
    settle_threads(config)
    renderer = load_renderer(ctx.models["policy"], config.text, config.model.trust_remote_code)
    of = config.gradients.of
    policy = _load(ctx, "policy", load_causal_lm if of == "weights" else load_with_adapter)
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


def _load(ctx: Context, role: str, load: Callable[..., Any] = load_causal_lm) -> Any:
    config = ctx.config
    if config.model.dtype == "float16":
        raise UserError(
            "Gradients in float16 underflow", where="model.dtype: float16", fix="Use bfloat16 (auto) or float32."
        )
    return load(ctx.models[role], dtype_of(config), device_of(config), config.model.trust_remote_code)


def _is_same(ctx: Context) -> bool:
    """Whether the reference is the policy: then Delta = 0 and no reference pass is needed."""
    return ctx.models["reference"].digest == ctx.models["policy"].digest


def batch_tokens(config: RunConfig) -> int:
    """Token budget of a batch; 1 in reference mode, where each pair goes alone."""
    return 1 if config.execution.deterministic else config.gradients.token_budget


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
        self.budget = TokenBudget.remembered(self.ctx, "gradients.token_budget", batch_tokens(self.ctx.config))
        self.begun = time.monotonic()
        self.tokens = 0

    def part(self, shard: Shard) -> Part:
        """Sketch a shard's training pairs."""
        rows = [row for row in shard.rows.to_pylist() if row["split"] == "train"]
        self.ctx.progress.advance(shard.rows.num_rows - len(rows))
        drops: list[Drop] = []
        kept: list[tuple[dict[str, Any], PairIds]] = []
        for row in rows:
            ids = self._ids(row)
            if isinstance(ids, Drop):
                drops.append(ids)
            else:
                kept.append((row, ids))
        self.ctx.progress.advance(len(drops))
        before, backoffs = self.tokens, self.budget.backoffs
        self.stats = {}
        tables = self._tables(shard, kept, drops)
        return Part(
            index=shard.index,
            tables=tables,
            tallies=tally("pair", [row["language"] for row in rows], drops),
            drops=drops,
            stats={
                "tokens": float(self.tokens - before),
                "memory_backoffs": float(self.budget.backoffs - backoffs),
                **self.stats,
            },
        )

    def _products(self) -> Products | None:
        """What the second pass of one_sided compares with."""
        return (
            Products.open(self.ctx, self.metadata) if self.ctx.config.gradients.sketch.method == "one_sided" else None
        )

    def _tables(
        self, shard: Shard, kept: list[tuple[dict[str, Any], PairIds]], drops: list[Drop]
    ) -> dict[str, pa.Table]:
        """The part's tables; pairs that fail are added to `drops`."""
        if self.products is not None:
            before = len(kept)
            kept = self.products.known(kept, drops)
            self.ctx.progress.advance(before - len(kept))
        return {"gradients": self._sketch(shard, kept, drops) if kept else self._empty()}

    def _ids(self, row: dict[str, Any]) -> PairIds | Drop:
        limit = self.ctx.config.text.max_length
        try:
            ids = self.renderer.pair_ids(row["prompt"], row["chosen"], row["rejected"])
        except RenderError as error:
            return Drop("pair", row["pair_id"], row["language"], "cannot_render", str(error), failed=True)
        if ids.chosen == ids.rejected:
            return Drop("pair", row["pair_id"], row["language"], "identical", "both answers are the same tokens")
        length = len(ids.prompt) + max(len(ids.chosen), len(ids.rejected))
        if length > limit:
            return Drop("pair", row["pair_id"], row["language"], "too_long", f"{length} tokens > {limit}")
        return ids

    def _sketch(self, shard: Shard, kept: list[tuple[dict[str, Any], PairIds]], drops: list[Drop]) -> pa.Table:
        pairs = [Pair(tuple(i.prompt), tuple(i.chosen), tuple(i.rejected)) for _, i in kept]
        misfits: list[int] = []
        reduce = None if self.products is None else self.products.reduce
        got = self.sketcher.run(pairs, self.budget, self._report, misfits, reduce)
        self.ctx.progress.advance(len(misfits))
        kept, pairs = self._without(misfits, kept, pairs, drops)
        if self.products is None or _is_same(self.ctx):
            ref_chosen, ref_rejected, misfits = self._reference(pairs, got)
        else:
            ref_chosen, ref_rejected, misfits = *self.products.references([row["pair_id"] for row, _ in kept]), []
        fitting = [n for n in range(len(pairs)) if n not in misfits]
        got, ref_chosen, ref_rejected = got.rows(fitting), ref_chosen[fitting], ref_rejected[fitting]
        kept, pairs = self._without(misfits, kept, pairs, drops)
        scalars = torch.stack([got.logp_chosen_N, got.logp_rejected_N, ref_chosen, ref_rejected], dim=1)
        finite = storable(got) & torch.isfinite(scalars).all(dim=1)
        for (row, _), good in zip(kept, finite.tolist(), strict=True):
            if not good:
                detail = "the backward pass gave values that are not finite"
                drops.append(Drop("pair", row["pair_id"], row["language"], "non_finite_gradient", detail, failed=True))
        good_rows = [pair for pair, good in zip(kept, finite.tolist(), strict=True) if good]
        if not good_rows:
            return self._empty()
        got, scalars = got.rows(finite.nonzero()[:, 0].tolist()), scalars[finite]
        if self.products is None:
            pairs = [pair for pair, good in zip(pairs, finite.tolist(), strict=True) if good]
            self._measure_error(shard, [row["pair_id"] for row, _ in good_rows], pairs, got.sketch_ND)
        columns: dict[str, Any] = {
            "pair_id": [row["pair_id"] for row, _ in good_rows],
            "group_id": [row["group_id"] for row, _ in good_rows],
            "language": [row["language"] for row, _ in good_rows],
            **self._vectors(got),
            "logp_chosen": scalars[:, 0].float().numpy(),
            "logp_rejected": scalars[:, 1].float().numpy(),
            "ref_logp_chosen": scalars[:, 2].float().numpy(),
            "ref_logp_rejected": scalars[:, 3].float().numpy(),
            "n_prompt": [len(ids.prompt) for _, ids in good_rows],
            "n_chosen": [len(ids.chosen) for _, ids in good_rows],
            "n_rejected": [len(ids.rejected) for _, ids in good_rows],
            "ids_hash": [ids.hash() for _, ids in good_rows],
        }
        return pa.table(columns, schema=self._schema())

    def _vectors(self, got: PairSketches) -> dict[str, Any]:
        """The columns that hold vectors."""
        if self.products is not None:
            return self.products.columns(got.sketch_ND)
        columns = sketch_columns("", got.sketch_ND)
        if got.chosen_ND is not None and got.rejected_ND is not None:
            columns |= sketch_columns("_chosen", got.chosen_ND) | sketch_columns("_rejected", got.rejected_ND)
        return columns

    def _measure_error(
        self, shard: Shard, ids: list[str], pairs: list[Pair], first_ND: torch.Tensor | None = None
    ) -> None:
        """On the shard that has the first training pair: sketch some pairs again with another seed and compare cosines.

        first_ND: the sketches with the first seed, if they are at hand.
        """
        config, sketcher = self.ctx.config, self.sketcher
        count = min(config.gradients.sketch.error_pairs, len(pairs))
        size = config.gradients.shard_size if first_ND is not None else config.gradients.aggregate_size
        if count < 2 or config.gradients.sketch.method == "exact":
            return
        if self.first_row is None:
            self.first_row = first_training_row(self.ctx)
        if self.first_row // size != shard.index:
            return
        order = sorted(range(len(pairs)), key=lambda n: (seed_for(config.seed, "sketch error", ids[n]), n))[:count]
        sample, misfits = [pairs[n] for n in order], list[int]()
        seed = seed_for(sketcher.seed, "second seed")
        second = Sketcher(
            sketcher.model,
            sketcher.layout,
            seed,
            scales=sketcher.scales,
            prefix_sharing=sketcher.sharing,
            of=sketcher.of,
        )
        with second:
            again_ND = second.run(sample, self.budget, misfits=misfits).sketch_ND
        order = [n for k, n in enumerate(order) if k not in misfits]
        if first_ND is None:
            first_nD = sketcher.run([pairs[n] for n in order], self.budget).sketch_ND if order else again_ND
        else:
            first_nD = first_ND[order]
        self.stats |= cosine_error(first_nD, again_ND)

    @staticmethod
    def _without(
        misfits: list[int], kept: list[tuple[dict[str, Any], PairIds]], pairs: list[Pair], drops: list[Drop]
    ) -> tuple[list[tuple[dict[str, Any], PairIds]], list[Pair]]:
        """Rows and pairs without the misfits, which become drops."""
        for n in misfits:
            row, detail = kept[n][0], f"the pair ({pairs[n].joined} tokens) does not fit in memory, even alone"
            drops.append(Drop("pair", row["pair_id"], row["language"], "out_of_memory", detail, failed=True))
        left = [n for n in range(len(pairs)) if n not in misfits]
        return [kept[n] for n in left], [pairs[n] for n in left]

    def _reference(self, pairs: list[Pair], got: PairSketches) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Log-probabilities of both sides under the reference [N], and the pairs that do not fit in memory."""
        if self.reference is None:
            return got.logp_chosen_N, got.logp_rejected_N, []
        rows, unfit = [side for pair in pairs for side in pair.rows], list[int]()
        found = iter(score_rows(self.reference, rows, self.budget, misfits=unfit))
        sums = [float("nan") if n in unfit else float(next(found).double().sum()) for n in range(len(rows))]
        values = torch.tensor(sums, dtype=torch.float64).to(got.logp_chosen_N.dtype)
        return values[0::2], values[1::2], sorted({n // 2 for n in unfit})

    def _report(self, batch: list[Pair]) -> None:
        self.tokens += sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in batch)
        rate = self.tokens / max(time.monotonic() - self.begun, 1e-9)
        self.ctx.progress.advance(len(batch), tokens_per_s=rate)

    def _schema(self) -> pa.Schema:
        """The gradients schema with what is needed to read a sketch: layer offsets and the projections' seed."""
        if self.products is not None:
            return self.products.schema
        return gradients_schema(self.sketcher.layout.dim, self.sketcher.both_sides).with_metadata(self.metadata)

    def _empty(self) -> pa.Table:
        return self._schema().empty_table()


def storable(got: PairSketches) -> torch.Tensor:
    """Which pairs have finite sketches whose norms fit float32 [N]."""
    parts = [part for part in (got.sketch_ND, got.chosen_ND, got.rejected_ND) if part is not None]
    norms = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float64).float() for part in parts]
    return torch.isfinite(torch.stack(norms)).all(dim=0)
