"""Factored Adam preconditioning before projection (docs/methods.md section 3).

Adam measures a gradient in units of sqrt(v), v the second moments: <G, G'>_v = sum_oi G_oi G'_oi / sqrt(v_oi). A full v
needs G; with v_oi = r_o c_i / mean(r), r and c the means of its rows and columns (Adafactor, arXiv 1804.04235, section
3), the metric is a factor on each side, delta_o / r_o^(1/4) and x_i / c_i^(1/4), and G stays unmaterialised. Here v is the
mean of d^2 over a seeded sample of pairs. r_o = mean_i G_oi^2 needs no G either: |row o of G A^T|^2 is an unbiased
estimate of sum_i G_oi^2 for Flora's A (E[A^T A] = 1), so that two one-sided sketches give both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from schemas.errors import UserError
from schemas.ids import seed_for
from schemas.tables import TABLES
from stages.contract import Account, Context, Rows, TableStage
from stages.gradients.batching import TokenBudget
from stages.gradients.layers import Of, select_layers
from stages.gradients.pair_sketches import PairSketches
from stages.gradients.projections import LayerShape, LayerSlot, Scales, SketchLayout, block_and_kind
from stages.gradients.rows import Pair
from stages.gradients.sketcher import Sketcher
from stages.models.device import device_of, dtype_of
from stages.models.load import load_text_model, load_with_adapter, settle_threads
from stages.text.render import RenderError, load_renderer

RANK = 16
FLOOR = 1e-6
"""Least share of its mean that a row or column of second moments is taken for: a weight that no sampled pair moved must
not be blown up."""


class Precondition(TableStage):
    """pairs -> preconditioner. No unit: the sample's pairs are accounted for by gradients."""

    def run(self, ctx: Context) -> Iterator[Rows | Account]:
        """See TableStage.run. Raises UserError when no pair of the sample gives a finite gradient."""
        config, sketch = ctx.config, ctx.config.gradients.sketch
        settle_threads(config)
        pairs = _sample(ctx)
        of = config.gradients.of
        load = load_text_model if of == "weights" else load_with_adapter
        model = load(ctx.models["policy"], dtype_of(config), device_of(config), config.model.trust_remote_code)
        ctx.progress.total(2 * len(pairs), "pairs")
        budget = TokenBudget.of_gradients(ctx)
        try:
            layers = select_layers(model, sketch.include, sketch.exclude, of).layers
            moments, used = second_moments(model, layers, pairs, budget, sketch.seed, ctx.progress.advance, of)
        except ValueError as error:
            raise UserError(
                f"The gradients of {ctx.models['policy'].name} cannot be sketched: {error}", where="gradients.sketch"
            ) from error
        rows = [
            {"layer": name, "side": side, "factor": (moment**-0.25).to(torch.float32).numpy()}
            for name, sides in moments.items()
            for side, moment in zip(("out", "in"), sides, strict=True)
        ]
        yield Rows("preconditioner", pa.Table.from_pylist(rows, schema=TABLES["preconditioner"].schema))
        yield Account([], stats={"pairs": float(used)})


def second_moments(
    model: Any,
    layers: tuple[LayerShape, ...],
    pairs: list[Pair],
    budget: TokenBudget,
    seed: int,
    report: Callable[[int], None] = lambda pairs: None,
    of: Of = "weights",
) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
    """({layer: (r / sqrt(mean r) [O], c / sqrt(mean c) [I])}, pairs used), float64: their outer product is v.

    Raises ValueError when no pair gives a finite gradient, or a layer's is zero in all of them.
    """
    found: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    used = len(pairs)
    for side in ("out", "in"):
        layout, misfits = _one_side(layers, side), list[int]()

        def reduce(
            indices: list[int], got: PairSketches, layout: SketchLayout = layout, side: str = side
        ) -> PairSketches:
            squares = []
            for slot in layout.layers:
                s_NOI = got.sketch_ND[:, slot.columns].view(-1, *slot.shape).to(torch.float64)
                squares.append(s_NOI.square().sum(dim=2 if side == "out" else 1))
            return PairSketches(torch.cat(squares, dim=1), got.logp_chosen_N, got.logp_rejected_N)

        with Sketcher(model, layout, seed_for(seed, "second moments"), of=of) as sketcher:
            square_NW = sketcher.run(pairs, budget, lambda batch: report(len(batch)), misfits, reduce).sketch_ND
        square_NW = square_NW[torch.isfinite(square_NW).all(dim=1)]
        used = min(used, len(square_NW))
        if used == 0:
            raise ValueError("no pair of the preconditioner's sample gives a finite gradient")
        start = 0
        for layer in layers:
            width, other = (layer.out_width, layer.in_width) if side == "out" else (layer.in_width, layer.out_width)
            mean_W = square_NW[:, start : start + width].mean(dim=0) / other
            start += width
            if (overall := float(mean_W.mean())) == 0.0:
                raise ValueError(f"the gradient of {layer.name} is zero in every pair of the preconditioner's sample")
            found[layer.name].append((mean_W / overall).clamp_min(FLOOR) * overall**0.5)
    return {name: (sides[0], sides[1]) for name, sides in found.items()}, used


def factors_of(ctx: Context) -> tuple[Scales | None, str]:
    """(factors on delta and x per layer, their hash) as the precondition stage left them; (None, "") without it."""
    if "preconditioner" not in ctx.inputs:
        return None, ""
    digest, factors = hashlib.sha256(), dict[str, dict[str, Tensor]]()
    for layer, side, values in ctx.scan("preconditioner").collect().sort("layer", "side").iter_rows():
        factor = torch.tensor(values, dtype=torch.float32)
        factors.setdefault(layer, {})[side] = factor
        digest.update(f"{layer}\x1f{side}\x1f".encode() + factor.numpy().tobytes())
    scales: Mapping[str, tuple[Tensor, Tensor]] = {name: (two["out"], two["in"]) for name, two in factors.items()}
    return scales, digest.hexdigest()


def _one_side(layers: tuple[LayerShape, ...], kept: str) -> SketchLayout:
    """A layout that keeps one side at full width and projects the other to `RANK`."""
    slots: list[LayerSlot] = []
    offset = 0
    for layer in layers:
        width = layer.in_width if kept == "out" else layer.out_width
        shape = (layer.name, layer.out_width, layer.in_width, min(RANK, width), offset)
        slots.append(LayerSlot(*shape, *block_and_kind(layer.name), sides=("in",) if kept == "out" else ("out",)))
        offset += slots[-1].size
    return SketchLayout(tuple(slots))


def _sample(ctx: Context) -> list[Pair]:
    """The first training pairs in a seeded order that gradients would keep: they render, differ and fit
    `text.max_length`."""
    config = ctx.config
    wanted = config.gradients.sketch.precondition_pairs
    renderer = load_renderer(ctx.models["policy"], config.text, config.model.trust_remote_code)
    ids = ctx.scan("pairs").filter(pl.col("split") == "train").select("pair_id").collect()["pair_id"].to_list()
    order = sorted(ids, key=lambda pair_id: (seed_for(config.seed, "precondition", pair_id), pair_id))
    found: list[Pair] = []
    for start in range(0, len(order), wanted):
        batch = order[start : start + wanted]
        rows = ctx.scan("pairs").filter(pl.col("pair_id").is_in(batch)).collect().to_dicts()
        for row in sorted(rows, key=lambda row: batch.index(row["pair_id"])):
            try:
                one = renderer.pair_ids(row["prompt"], row["chosen"], row["rejected"])
            except RenderError:
                continue
            if one.chosen == one.rejected:  # gradients drops it: nothing but rounding
                continue
            pair = Pair(tuple(one.prompt), tuple(one.chosen), tuple(one.rejected))
            if pair.longest <= config.text.max_length and len(found) < wanted:
                found.append(pair)
        if len(found) == wanted:
            break
    if not found:
        raise UserError(
            "No training pair is left to estimate the preconditioner on",
            where="gradients.sketch.precondition",
            fix="See what was dropped: congrad status.",
        )
    return found
