"""float16 storage of sketches: unit norm times a constant, the norm in float32 beside it; and what tells two stores
apart: sketches can only be compared when layers, projections, preconditioner and model are the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from schemas.errors import UserError
from schemas.sketches import sketch_array
from stages.gradients.projections import SketchLayout

LAYOUT_KEY = b"sketch_layout"
SEED_KEY = b"sketch_seed"
MODEL_KEY = b"sketch_model"
FACTORS_KEY = b"sketch_preconditioner"
LANGUAGES_KEY = b"product_languages"
GROUPS_KEY = b"product_groups"
_KEYS = (LAYOUT_KEY, SEED_KEY, MODEL_KEY, FACTORS_KEY, LANGUAGES_KEY, GROUPS_KEY)

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


def store_metadata(layout: SketchLayout, seed: int, model: str, factors: str) -> dict[bytes, bytes]:
    """Metadata of a gradients table: what is needed to read its sketches and to refuse others beside them.

    model: digest of the policy; factors: hash of the preconditioner, empty without one.
    """
    return {
        LAYOUT_KEY: layout.to_json().encode(),
        SEED_KEY: str(seed).encode(),
        MODEL_KEY: model.encode(),
        FACTORS_KEY: factors.encode(),
    }


def common_metadata(files: Sequence[Path]) -> dict[bytes, bytes]:
    """The sketch metadata of the gradients files. Raises UserError, naming two of them, if they are not comparable."""
    found: dict[bytes, bytes] = {}
    for number, file in enumerate(files):
        given = pq.read_schema(file).metadata or {}
        mine = {key: given[key] for key in _KEYS if key in given}
        if LAYOUT_KEY not in mine or (number and mine != found):
            other = {LAYOUT_KEY: "layers", SEED_KEY: "projections (seed)", MODEL_KEY: "models", FACTORS_KEY: "factors"}
            apart = [name for key, name in other.items() if mine.get(key) != found.get(key)]
            raise UserError(
                f"These gradient sketches were made with different layers or projections and cannot be compared: "
                f"{file.name} and {files[0].name} differ in {', '.join(apart) or 'languages'}",
                where=str(file.parent),
                fix="Redo them: --force-stage gradients.",
            )
        found = mine
    return found


def sketch_columns(name: str, sketch_ND: Tensor) -> dict[str, pa.Array]:
    """Columns `sketch<name>` and `norm<name>` of the gradients table."""
    stored_ND, norm_N = pack_sketches(sketch_ND)
    return {f"sketch{name}": sketch_array(stored_ND.numpy()), f"norm{name}": pa.array(norm_N.numpy())}
