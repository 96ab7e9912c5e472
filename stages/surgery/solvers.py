"""The surgery methods that are TorchJD's: read by the checks before a run, so it imports nothing heavy.

A method of ours is a function in `methods.py` and needs no line here; either is listed in `ConflictConfig.surgery` besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class TorchJD:
    """A weighting of a Gram matrix by its name in torchjd.aggregation, with its arguments.

    packages: what it needs beside torchjd; dual_cone: it solves a quadratic program over the directions' dual cone (arXiv 2406.16232);
    gains_alike: every direction's share of the merged one is equal, and TorchJD leaves it negative where its weights sum to less than 0;
    weighted: how it takes a weight for each language (see `stages.surgery.methods.WEIGHTED`), None: it cannot.
    """

    weighting: str
    arguments: Mapping[str, float] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    dual_cone: bool = False
    gains_alike: bool = False
    weighted: Literal["scaled"] | None = "scaled"


_QUADPROG = ("qpsolvers", "quadprog")

TORCHJD: Mapping[str, TorchJD] = {
    "imtl_g": TorchJD("IMTLGWeighting", weighted=None, gains_alike=True),
    "aligned_mtl": TorchJD("AlignedMTLWeighting", weighted=None),
    "gradvac": TorchJD("GradVacWeighting"),
    "upgrad": TorchJD("UPGradWeighting", packages=_QUADPROG, dual_cone=True),
    "dualproj": TorchJD("DualProjWeighting", packages=_QUADPROG, dual_cone=True),
    "cagrad": TorchJD("CAGradWeighting", {"c": 0.5, "norm_eps": 1e-6}, packages=("cvxpy", "clarabel")),
}
"""By their name in `conflict.surgery`."""


def packages(method: str) -> list[str]:
    """Packages that a method of `conflict.surgery` needs beside torch: none for ours."""
    return ["torchjd", *TORCHJD[method].packages] if method in TORCHJD else []
