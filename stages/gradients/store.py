"""float16 storage of sketches: unit norm times a constant, the norm in float32 beside it."""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = 64.0
"""A stored sketch has this norm. No entry can exceed it, a product of two stored sketches (4,096)
fits float16 (65,504), and entries keep all 11 bits down to 1e-6 of the norm, so that a quiet layer
survives beside a loud one."""


def pack_sketches(sketch_ND: Tensor) -> tuple[Tensor, Tensor]:
    """(stored [N, dim] float16, norm [N] float32) of sketches [N, dim].

    A zero sketch is stored as zeros with norm 0. Raises ValueError, with the row, for entries that
    are not finite or a norm that does not fit float32.
    """
    wide = sketch_ND.to(torch.float64)
    norm_N = torch.linalg.vector_norm(wide, dim=1)
    bad = ~torch.isfinite(norm_N.to(torch.float32))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"sketch in row {row} is not finite (or its norm exceeds float32): the backward pass overflowed"
        )
    scale_N = torch.where(norm_N > 0, SCALE / norm_N, 0.0)
    return (wide * scale_N[:, None]).to(torch.float16), norm_N.to(torch.float32)


def unpack_sketches(stored_ND: Tensor, norm_N: Tensor) -> Tensor:
    """Sketches [N, dim] in float32 from what `pack_sketches` gave; entries are right to 2^-11,
    norms to about 1e-6."""
    return stored_ND.to(torch.float32) * (norm_N.to(torch.float32) / SCALE)[:, None]
