"""What the surgery methods need installed: read by the checks before a run, so it imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping

SOLVERS: Mapping[str, tuple[str, ...]] = {
    "mgda": (),
    "imtl_g": (),
    "aligned_mtl": (),
    "gradvac": (),
    "upgrad": ("qpsolvers", "quadprog"),
    "dualproj": ("qpsolvers", "quadprog"),
    "cagrad": ("cvxpy", "clarabel"),
    "nash_mtl": ("cvxpy", "ecos"),
}
"""TorchJD's methods by their name in `conflict.surgery`, and the packages each needs beside torchjd itself."""


def packages(method: str) -> list[str]:
    """Packages that a method of `conflict.surgery` needs beside torch: none for ours."""
    return ["torchjd", *SOLVERS[method]] if method in SOLVERS else []
