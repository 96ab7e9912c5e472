"""What a fight between training, merging and projecting looks like, in a few numbers."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
import torch.distributed as dist

from stages.train.optimizers.shard import add_up


class Telemetry:
    """Sums over parameters within one step, in float64 on the CPU; of sharded ones over what each process holds. peers: the
    processes that hold the rest."""

    def __init__(self) -> None:
        self.sums: dict[dist.ProcessGroup | None, defaultdict[str, float]] = {}

    def merge(self, delta: torch.Tensor, tau: torch.Tensor, a: float, peers: dist.ProcessGroup | None = None) -> None:
        """AdamW's step and what pulls at it, before the merge."""
        sums = self._of(peers)
        sums["delta"] += _square(delta)
        sums["tau"] += _square(tau)
        sums["a_tau"] += a * a * _square(tau)
        sums["product"] += float(torch.dot(delta, tau))
        sums["conflicts"] += float(((delta * tau) < 0).sum())
        sums["both"] += float(((delta != 0) & (tau != 0)).sum())

    def drift(self, displacement: torch.Tensor, peers: dist.ProcessGroup | None = None) -> None:
        """The weights' way from their start."""
        self._of(peers)["drift"] += _square(displacement)

    def project(self, before: float, after: float, peers: dist.ProcessGroup | None = None) -> None:
        """Squared norms of an update before and after the projection."""
        sums = self._of(peers)
        sums["before"] += before
        sums["after"] += after

    def _of(self, peers: dist.ProcessGroup | None) -> defaultdict[str, float]:
        return self.sums.setdefault(peers, defaultdict(float))

    def _total(self) -> defaultdict[str, float]:
        """The sums over all parameters. Collective for sharded ones."""
        total: defaultdict[str, float] = defaultdict(float)
        for peers, sums in self.sums.items():
            values = torch.tensor([sums[name] for name in sorted(sums)], dtype=torch.float64)
            if peers is not None:
                device = "cpu" if "gloo" in dist.get_backend(peers) else "cuda"
                values = add_up(values.to(device), peers)
            for name, value in zip(sorted(sums), values.tolist(), strict=True):
                total[name] += value
        return total

    def values(self) -> dict[str, float]:
        """|delta|, |a tau|, cos(delta, tau), share of entries with opposite signs, drift in units of |tau|, |Pi u| / |u|."""
        total = self._total()
        found: dict[str, float] = {"drift_norm": math.sqrt(total["drift"])}
        if total["tau"]:
            found["drift"] = math.sqrt(total["drift"] / total["tau"])
        if total["both"]:
            found["sign_conflict"] = total["conflicts"] / total["both"]
        if total["delta"]:
            found["delta_norm"] = math.sqrt(total["delta"])
            found["pull_norm"] = math.sqrt(total["a_tau"])
            if total["tau"]:
                found["cosine"] = total["product"] / math.sqrt(total["delta"] * total["tau"])
        if total["before"]:
            found["projected"] = math.sqrt(total["after"] / total["before"])
        return found


def _square(flat: torch.Tensor) -> float:
    return float(torch.dot(flat, flat))
