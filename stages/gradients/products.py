"""The second pass of one-sided compression: inner products of every pair with the finished directions.

A one-sided sketch has millions of numbers and is never stored. What conflict needs of it is a_k = <g_i, G_k> for every
language k and layer group, and |g_i|^2: leave-one-out follows from these (docs/methods.md section 4).
"""

from __future__ import annotations

import json
import math
from typing import Any

import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from schemas.tables import products_schema
from stages.contract import Context, Drop
from stages.gradients.cuts import COLUMNS, all_off_topic
from stages.gradients.items import Item
from stages.gradients.pair_sketches import PairSketches
from stages.gradients.projections import SketchLayout
from stages.gradients.store import GROUPS_KEY, LANGUAGES_KEY, LAYOUT_KEY
from stages.gradients.sums import Sums, sums_key


class Products:
    """directions_LD: G; groups [layers]: number of each layer's group (transformer block); contributions:
    pair_id, log-probabilities under the reference and relevance of every pair of the first pass; read part by part.
    """

    def __init__(
        self,
        layout: SketchLayout,
        metadata: dict[bytes, bytes],
        sums: Sums,
        contributions: pl.LazyFrame,
    ) -> None:
        self.layout, self.languages = layout, sums.languages
        self._directions_LD = sums.directions(layout).to(torch.float32)
        self._contributions = contributions
        names = list(layout.groups("block"))
        self._groups = [names.index(layout.group_of(slot)) for slot in layout.layers]
        self.schema = products_schema(len(names), len(sums.languages)).with_metadata(
            {
                **metadata,
                LANGUAGES_KEY: json.dumps(sums.languages).encode(),
                GROUPS_KEY: json.dumps(names).encode(),
            }
        )
        self._shape = (len(names), len(sums.languages))

    @classmethod
    def open(cls, ctx: Context, metadata: dict[bytes, bytes]) -> Products:
        """Read the first pass. Raises UserError if it was made with other layers, projections, another model or direction, or holds every pair back."""
        sums = Sums.open(ctx, sums_key(metadata, ctx.config.conflict))
        columns = ("pair_id", "ref_logp_chosen", "ref_logp_rejected", *COLUMNS)
        contributions = ctx.scan("contributions").select(columns)
        if not sums.languages and not contributions.head(1).collect().is_empty():
            raise all_off_topic()
        return cls(SketchLayout.from_json(metadata[LAYOUT_KEY].decode()), metadata, sums, contributions)

    def known(self, items: list[Item], drops: list[Drop]) -> list[Item]:
        """A part's pairs that are in a direction, with the references of the first pass; the others become drops."""
        wanted = [item.pair_id for item in items]
        rows = self._contributions.filter(pl.col("pair_id").is_in(wanted)).collect()
        found = {row[0]: [math.nan if value is None else value for value in row[1:]] for row in rows.iter_rows()}
        detail = "it failed in the first pass: see the dropped rows of aggregate"
        left = []
        for item in items:
            if (values := found.get(item.pair_id)) is not None:
                item.reference, item.relevance, item.null = (
                    (values[n], values[n + 1]) for n in range(0, len(values), 2)
                )
                left.append(item)
            else:
                drops.append(item.dropped("not_aggregated", detail, failed=True))
        return left

    def reduce(self, indices: list[int], got: PairSketches) -> PairSketches:
        """The same with sketch_ND [N, S * L + S] = (a [S, L], |g|^2 [S]), float64; one layer at a time."""
        groups, languages = self._shape
        a_NSL = torch.zeros(len(got.sketch_ND), groups, languages, dtype=torch.float64)
        square_NS = torch.zeros(len(got.sketch_ND), groups, dtype=torch.float64)
        for slot, group in zip(self.layout.layers, self._groups, strict=True):
            g_ND = got.sketch_ND[:, slot.columns]
            direction_LD = self._directions_LD[:, slot.columns].to(g_ND.dtype)
            a_NSL[:, group] += (g_ND @ direction_LD.T).to(torch.float64)
            square_NS[:, group] += torch.linalg.vector_norm(g_ND, dim=1, dtype=torch.float64).square()
        reduced_ND = torch.cat([a_NSL.flatten(1), square_NS], dim=1)
        return PairSketches(reduced_ND, got.logp_chosen_N, got.logp_rejected_N)

    def columns(self, reduced_ND: Tensor) -> dict[str, Any]:
        """Columns of the gradients table from what `reduce` made."""
        groups, languages = self._shape
        a_NM, square_NS = reduced_ND.split([groups * languages, groups], dim=1)
        lists = {
            name: pa.FixedSizeListArray.from_arrays(pa.array(part.flatten().numpy()), part.shape[1])
            for name, part in (("products", a_NM), ("squares", square_NS))
        }
        return {**lists, "norm": square_NS.sum(dim=1).sqrt().float().numpy()}
