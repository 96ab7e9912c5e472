"""Where one pair's score comes from: the layer groups it agrees or conflicts in, and the pairs nearest and most opposed."""

from __future__ import annotations

from dataclasses import dataclass

import faiss
import numpy as np
import torch
from torch import Tensor

from schemas.errors import UserError
from stages.conflict.metric import unit_rows
from stages.conflict.prepare import Prepared, surgery_of
from stages.conflict.stream import Chunks, blocks, scaled_rows
from stages.contract import Context


@dataclass(frozen=True)
class LayerGroup:
    """A layer group's part in the score, the pair and its group left out of every direction.

    share: of the pair's squared norm; contribution: to the score, they add up to it; cosine: with the merged direction
    inside the group; cosines: the same per language. None where a direction has no length.
    """

    name: str
    share: float
    contribution: float
    cosine: float | None
    cosines: dict[str, float | None]


@dataclass(frozen=True)
class Neighbour:
    """Another pair and the cosine of the two gradients, as sketched, in the metric of the run."""

    pair_id: str
    language: str
    cosine: float


@dataclass(frozen=True)
class Explanation:
    """leaves_with: pairs that leave every direction together with this one."""

    leaves_with: list[str]
    layer_groups: list[LayerGroup]
    nearest: list[Neighbour]
    opposed: list[Neighbour]


def explain_pair(ctx: Context, pair_id: str, k: int = 5) -> Explanation:
    """Explain a pair of the gradients table. ctx.inputs: gradients, pairs, directions.

    Neighbours are found by brute force over all stored sketches, so exactly; the sketches estimate the gradients' cosines.
    Raises UserError when the pair has no gradient.
    """
    ready = Prepared.of(ctx)
    at = ready.store.frame["pair_id"].index_of(pair_id)
    if at is None and pair_id in ready.store.gate.held["pair_id"]:
        raise UserError(f"Pair {pair_id} is off-topic: it is compared with no direction", where="conflict.relevance")
    if at is None:
        raise UserError(f"Pair {pair_id} has no gradient", fix="See congrad inspect RUN dropped/gradients.")
    label_N = ready.groups.label_N
    members = [at] if label_N is None else (label_N == label_N[at]).nonzero()[:, 0].tolist()
    chunks, scale_D = ready.chunks()
    g_D, removed_LD, gone_L = _leaving(ready, chunks, scale_D, members, at)
    nearest, opposed = _neighbours(ready, chunks, scale_D, g_D, at, k)
    ids = ready.store.frame["pair_id"]
    groups = _layer_groups(ready, g_D, removed_LD, gone_L, members, at)
    return Explanation([ids[i] for i in members if i != at], groups, nearest, opposed)


def _leaving(
    ready: Prepared, chunks: Chunks, scale_D: Tensor | None, members: list[int], at: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(g [D] of the pair, sum of omega_j g_j over the members of each language [L, D], sum of omega_j [L]), float64."""
    n_languages, where = len(ready.languages), torch.tensor(members)
    g_D, removed_LD = torch.empty(0), torch.empty(0)
    for block in blocks(chunks):
        here = where[(where >= block.start) & (where < block.stop)] - block.start
        x_mD = block.x_ND[here].to(torch.float64) * block.factor_N[here, None]
        if not len(removed_LD):
            removed_LD = torch.zeros(n_languages, block.x_ND.shape[1], dtype=torch.float64)
        index_m = here + block.start
        removed_LD.index_add_(0, ready.language_N[index_m], ready.omega_N[index_m, None] * x_mD)
        if block.start <= at < block.stop:
            g_D = block.x_ND[at - block.start].to(torch.float64) * block.factor_N[at - block.start]
        if block.stop > members[-1]:
            break
    if scale_D is not None:
        g_D, removed_LD = g_D * scale_D, removed_LD * scale_D
    gone_L = torch.zeros(n_languages, dtype=torch.float64).index_add_(
        0, ready.language_N[where], ready.omega_N[where].to(torch.float64)
    )
    return g_D, removed_LD, gone_L


def _layer_groups(
    ready: Prepared, g_D: Tensor, removed_LD: Tensor, gone_L: Tensor, members: list[int], at: int
) -> list[LayerGroup]:
    config = ready.ctx.config.conflict
    direction_LD, weight = _directions(ready, len(g_D))
    language_m = ready.language_N[members]
    gone = torch.bincount(language_m[ready.omega_N[members] > 0], minlength=len(gone_L))
    left_L = ready.count_L > gone
    rest_LD = torch.where(left_L[:, None], (direction_LD - removed_LD) / (1 - gone_L).clamp_min(1e-12)[:, None], 0.0)
    if config.refit:
        method, scopes = surgery_of(ready.ctx, ready.languages), {"model": slice(None), **ready.blocks}
        weight = {name: method(rest_LD[:, scopes[name]] @ rest_LD[:, scopes[name]].T) for name in weight}
    own, others = int(ready.language_N[at]), config.against == "others" and len(gone_L) > 1
    merged_D = torch.zeros_like(g_D)
    for name, columns in ready.blocks.items():
        weight_L = weight.get(name, weight.get("model", torch.zeros(len(gone_L), dtype=torch.float64))).clone()
        if others:
            weight_L[own] = 0.0
        merged_D[columns] = weight_L @ rest_LD[:, columns]
    scale = float(g_D.norm() * merged_D.norm())
    return [
        LayerGroup(
            name=name,
            share=float(g_D[columns].square().sum() / g_D.square().sum().clamp_min(1e-300)),
            contribution=float(g_D[columns] @ merged_D[columns]) / scale if scale else 0.0,
            cosine=_cosine(g_D[columns], merged_D[columns]),
            cosines={code: _cosine(g_D[columns], rest_LD[n, columns]) for n, code in enumerate(ready.languages)},
        )
        for name, columns in ready.blocks.items()
    ]


def _directions(ready: Prepared, dim: int) -> tuple[Tensor, dict[str, Tensor]]:
    """(G [L, D], {scope: w [L]}) from the directions table."""
    n_languages = len(ready.languages)
    direction_LD = torch.zeros(n_languages, dim, dtype=torch.float64)
    weight: dict[str, Tensor] = {}
    columns = {"model": slice(None), **ready.blocks}
    for row in ready.ctx.scan("directions").collect().iter_rows(named=True):
        n = ready.languages.index(row["language"])
        direction_LD[n, columns[row["scope"]]] = torch.tensor(row["direction"], dtype=torch.float64)
        weight.setdefault(row["scope"], torch.zeros(n_languages, dtype=torch.float64))[n] = row["weight"]
    return direction_LD, weight


def _neighbours(
    ready: Prepared, chunks: Chunks, scale_D: Tensor | None, own_D: Tensor, at: int, k: int
) -> tuple[list[Neighbour], list[Neighbour]]:
    if not bool(own_D.any()):
        return [], []
    query = unit_rows(torch.stack([own_D, -own_D])).to(torch.float32).numpy()
    value_2n, index_2n = np.empty((2, 0), np.float32), np.empty((2, 0), np.int64)
    for block in blocks(chunks):
        (there_n,) = block.factor_N.nonzero(as_tuple=True)  # a pair that the loss gives no gradient is near nothing
        if not len(there_n):
            continue
        x_nD = (
            scaled_rows(block.x_ND[there_n], scale_D).to(torch.float32) * block.factor_N[there_n, None].sign().float()
        )
        unit_nD = torch.nn.functional.normalize(x_nD, dim=1).numpy()
        value, index = faiss.knn(query, unit_nD, min(k + 1, len(unit_nD)), metric=faiss.METRIC_INNER_PRODUCT)
        index = there_n.numpy()[index] + block.start
        value_2n, index_2n = np.hstack([value_2n, value]), np.hstack([index_2n, index])
        best = np.argsort(-value_2n, axis=1, kind="stable")[:, : k + 1]
        value_2n, index_2n = np.take_along_axis(value_2n, best, 1), np.take_along_axis(index_2n, best, 1)
    ids, languages = ready.store.frame["pair_id"], ready.store.frame["language"]
    nearest, opposed = (
        [
            Neighbour(ids[i], languages[i], sign * float(value))
            for i, value in zip(index_n.tolist(), value_n, strict=True)
            if i != at
        ][:k]
        for sign, value_n, index_n in zip((1, -1), value_2n, index_2n, strict=True)
    )
    return nearest, opposed


def _cosine(a: Tensor, b: Tensor) -> float | None:
    scale = float(a.norm() * b.norm())
    return max(-1.0, min(1.0, float(a @ b) / scale)) if scale else None
