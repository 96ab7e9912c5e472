"""What a fight between training, merging and projecting looks like, in a few numbers."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
import torch.distributed as dist

from stages.train.optimizers.shard import add_up


class Telemetry:
    """Sums over parameters within one step, kept where they are made and fetched once, in `values`; of sharded ones over what each process
    holds. peers: the processes that hold the rest."""

    def __init__(self) -> None:
        self.sums: dict[dist.ProcessGroup | None, defaultdict[str, list[torch.Tensor]]] = {}

    def merge(self, delta: torch.Tensor, tau: torch.Tensor, a: float, peers: dist.ProcessGroup | None = None) -> None:
        """AdamW's step and what pulls at it, before the merge; flat."""
        of_tau = torch.dot(tau, tau)
        self._add(
            peers,
            delta=torch.dot(delta, delta),
            tau=of_tau,
            a_tau=a * a * of_tau,
            product=torch.dot(delta, tau),
            conflicts=((delta * tau) < 0).sum(),
            both=((delta != 0) & (tau != 0)).sum(),
        )

    def drift(self, displacement: torch.Tensor, peers: dist.ProcessGroup | None = None) -> None:
        """The weights' way from their start."""
        self._add(peers, drift=displacement.square().sum())

    def project(self, before: torch.Tensor, after: torch.Tensor, peers: dist.ProcessGroup | None = None) -> None:
        """Norms of an update before and after the projection."""
        self._add(peers, before=before.square(), after=after.square())

    def _add(self, peers: dist.ProcessGroup | None, **values: torch.Tensor) -> None:
        sums = self.sums.setdefault(peers, defaultdict(list))
        for name, value in values.items():
            sums[name].append(value.double())

    def _total(self) -> defaultdict[str, float]:
        """The sums over all parameters. Collective for sharded ones."""
        total: defaultdict[str, float] = defaultdict(float)
        for peers, sums in self.sums.items():
            values = torch.stack([torch.stack(sums[name]).sum() for name in sorted(sums)])
            for name, value in zip(sorted(sums), add_up(values, peers).tolist(), strict=True):
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
