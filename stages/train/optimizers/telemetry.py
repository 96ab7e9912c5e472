"""What a fight between training, merging and projecting looks like, in a few numbers."""

from __future__ import annotations

import math
from collections import defaultdict

import torch


class Telemetry:
    """Sums over parameters within one step, in float64 on the CPU."""

    def __init__(self) -> None:
        self.sums: defaultdict[str, float] = defaultdict(float)

    def merge(self, delta: torch.Tensor, tau: torch.Tensor, a: float) -> None:
        """AdamW's step and what pulls at it, before the merge."""
        self.sums["delta"] += _square(delta)
        self.sums["tau"] += _square(tau)
        self.sums["a_tau"] += a * a * _square(tau)
        self.sums["product"] += float(torch.dot(delta, tau))
        self.sums["conflicts"] += float(((delta * tau) < 0).sum())
        self.sums["both"] += float(((delta != 0) & (tau != 0)).sum())

    def drift(self, displacement: torch.Tensor) -> None:
        """The weights' way from their start."""
        self.sums["drift"] += _square(displacement)

    def project(self, before: float, after: float) -> None:
        """Squared norms of an update before and after the projection."""
        self.sums["before"] += before
        self.sums["after"] += after

    def values(self) -> dict[str, float]:
        """|delta|, |a tau|, cos(delta, tau), share of entries with opposite signs, drift in units of |tau|, |Pi u| / |u|."""
        total = self.sums
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
