"""Random projections and the layout of a sketch.

`two_sided`: a linear layer W (O x I) with per-pair gradient G (O x I) is stored as S = P_o G P_i^T
(P x P), LoGra's two-sided random projection (arXiv 2405.13954, section 3.2). Entries of P_o and P_i are
zero-mean, independent, of variance 1/P, and P_o is independent of P_i, so that E<S, S'> = <G, G'>.
For Gaussian entries

    Var<S, S'> = (1/P)   [|G^T G'|^2 + |G G'^T|^2 + 2 tr((G^T G')^2)]
               + (1/P^2) [|G|^2 |G'|^2 + <G, G'>^2 + |G^T G'|^2 + |G G'^T|^2].

`one_sided` (Flora, arXiv 2402.03293, section 2.2): only the wider side is compressed, C = G A^T (O x R)
where I >= O, else C = A G (R x I), with A_ij ~ N(0, 1/R), so that E[A^T A] = 1 and no further scale is
needed. Which side is compressed is our choice: Flora's released code compresses the other one. In the
layout a side without a projection keeps its full width; `exact` projects neither side: S = G.

A matrix depends on (user seed, layer name, side) and nothing else: every worker, device, language
and pair of a round shares it, and it is redrawn when needed instead of being stored.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, cast

import torch
from torch import Tensor

Side = Literal["out", "in"]
Method = Literal["two_sided", "one_sided", "exact"]
DEFAULT_SKETCH_DIM = 8192
DEFAULT_RANK = 16
MAX_EXACT_PARAMETERS = 500_000
"""`exact` stores two bytes per parameter and pair, and conflict holds chunks of such rows: for small models only."""

Scales = Mapping[str, tuple[Tensor, Tensor]]
"""Layer name -> (out [O], in [I]) factors that multiply delta_t and x_t before projection (see preconditioner.py)."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A layer that can be sketched: its qualified name and the widths of its weight W (O x I)."""

    name: str
    out_width: int
    in_width: int


@dataclass(frozen=True, slots=True)
class LayerSlot:
    """Where one layer lives in the sketch: columns [offset, offset + size), row-major S (out side x
    in side).

    `sides` are the projected ones: each has width p in S, the others their full width. `block` is the transformer block's index (None outside the blocks), `kind` the module's name
    inside its block, for example `self_attn.q_proj`.
    """

    name: str
    out_width: int
    in_width: int
    p: int
    offset: int
    block: int | None
    kind: str
    sides: tuple[Side, ...] = ("out", "in")

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of S."""
        return (self.p if "out" in self.sides else self.out_width, self.p if "in" in self.sides else self.in_width)

    @property
    def size(self) -> int:
        """Number of sketch columns of this layer."""
        return math.prod(self.shape)

    @property
    def columns(self) -> slice:
        """Columns of this layer in a sketch."""
        return slice(self.offset, self.offset + self.size)


@dataclass(frozen=True)
class SketchLayout:
    """Order, widths and offsets of all sketched layers; stored in the gradients table's metadata as
    JSON."""

    layers: tuple[LayerSlot, ...]

    @property
    def dim(self) -> int:
        """Total sketch columns."""
        return sum(slot.size for slot in self.layers)

    @classmethod
    def plan(
        cls,
        shapes: Sequence[LayerShape],
        dim: int = DEFAULT_SKETCH_DIM,
        method: Method = "two_sided",
        rank: int = DEFAULT_RANK,
    ) -> SketchLayout:
        """two_sided: share `dim` columns equally, P = floor(sqrt(dim / n_layers)), at least 1, at most the
        layer's narrower width. one_sided: R = `rank`, at most the layer's wider width, on the wider side.
        exact: nothing is projected.

        Raises ValueError when there is no layer, `dim` or `rank` < 1, a name occurs twice, or the exact
        gradient has more than `MAX_EXACT_PARAMETERS` entries.
        """
        if not shapes:
            raise ValueError("no layer to sketch: the include/exclude patterns leave nothing")
        if dim < 1:
            raise ValueError(f"sketch.dim must be at least 1, got {dim}")
        if rank < 1:
            raise ValueError(f"sketch.rank must be at least 1, got {rank}")
        entries = sum(shape.out_width * shape.in_width for shape in shapes)
        if method == "exact" and entries > MAX_EXACT_PARAMETERS:
            raise ValueError(
                f"exact gradients of {entries:,} parameters are too large to store (at most {MAX_EXACT_PARAMETERS:,}): "
                "take method two_sided, or sketch fewer layers"
            )
        names = [shape.name for shape in shapes]
        if len(set(names)) != len(names):
            raise ValueError("layer names must be unique")
        p_shared = max(1, math.isqrt(dim // len(shapes)))
        slots: list[LayerSlot] = []
        offset = 0
        for shape in shapes:
            widths = (shape.out_width, shape.in_width)
            p, sides = min(p_shared, *widths), cast(tuple[Side, ...], ("out", "in"))
            if method == "one_sided":
                p, sides = min(rank, max(widths)), ("in",) if shape.in_width >= shape.out_width else ("out",)
            elif method == "exact":
                p, sides = 0, ()
            slots.append(LayerSlot(shape.name, *widths, p, offset, *block_and_kind(shape.name), sides))
            offset += slots[-1].size
        return cls(tuple(slots))

    def groups(self, by: Literal["model", "block", "kind", "layer"]) -> dict[str, list[slice]]:
        """Column slices of each layer group, in layer order; `model` is the single group of
        everything."""
        found: dict[str, list[slice]] = {}
        for slot in self.layers:
            found.setdefault(self.group_of(slot, by), []).append(slot.columns)
        return found

    @staticmethod
    def group_of(slot: LayerSlot, by: Literal["model", "block", "kind", "layer"] = "block") -> str:
        """Name of the group a layer belongs to."""
        block = "other" if slot.block is None else f"block.{slot.block}"
        return {"model": "model", "block": block, "kind": slot.kind, "layer": slot.name}[by]

    def group_columns(self, by: Literal["model", "block", "kind", "layer"]) -> dict[str, Tensor]:
        """Column indices (int64) of each layer group; together they partition range(dim)."""
        return {
            key: torch.cat([torch.arange(s.start, s.stop) for s in slices]) for key, slices in self.groups(by).items()
        }

    def to_json(self) -> str:
        """Compact JSON; `from_json` gives an equal layout back."""
        return json.dumps({"layers": [asdict(slot) for slot in self.layers]}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> SketchLayout:
        """Read `to_json`. Raises ValueError when offsets do not follow each other (a damaged or
        edited layout)."""
        layout = cls(tuple(LayerSlot(**{**slot, "sides": tuple(slot["sides"])}) for slot in json.loads(text)["layers"]))
        offset = 0
        for slot in layout.layers:
            if slot.offset != offset:
                raise ValueError(f"layout is damaged: {slot.name} starts at {slot.offset}, not {offset}")
            offset += slot.size
        return layout


def block_and_kind(name: str) -> tuple[int | None, str]:
    """Split `model.layers.3.self_attn.q_proj` into (3, `self_attn.q_proj`); no index gives (None,
    name)."""
    match = re.match(r"(?:.*?\.)??(\d+)\.(.+)$", name)
    return (int(match.group(1)), match.group(2)) if match else (None, name)


def projection_seed(seed: int, name: str, side: Side) -> int:
    """A 63-bit generator seed: blake2b of (user seed, layer name, side), the same everywhere."""
    digest = hashlib.blake2b(f"{seed}\x1f{name}\x1f{side}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def projection(seed: int, name: str, side: Side, p: int, width: int) -> Tensor:
    """Gaussian projection [P, width], float32 on the CPU, entries of variance 1/P.

    Drawn in float64 and rounded: the float32 generator takes a vectorised path whose last bits
    depend on the processor.
    """
    generator = torch.Generator(device="cpu").manual_seed(projection_seed(seed, name, side))
    draw = torch.randn(p, width, generator=generator, dtype=torch.float64, device="cpu")
    return (draw / math.sqrt(p)).to(torch.float32)


def side_maps(seed: int, slot: LayerSlot, scales: Scales | None = None) -> tuple[Tensor | None, Tensor | None]:
    """What turns delta_t and x_t into their sides of S (see `apply_side`), float32 on the CPU, for (out, in).

    A projected side: its matrix [P, width], the layer's scale multiplied into its columns. A side of full
    width: the scale [width], or None when there is nothing to do.
    """
    scale = dict(zip(("out", "in"), scales[slot.name], strict=True)) if scales is not None else {}
    found: list[Tensor | None] = []
    for side, width in (("out", slot.out_width), ("in", slot.in_width)):
        factor = scale.get(side)
        if side not in slot.sides:
            found.append(factor)
            continue
        matrix_PW = projection(seed, slot.name, cast(Side, side), slot.p, width)
        found.append(matrix_PW if factor is None else matrix_PW * factor)
    return found[0], found[1]


def apply_side(value: Tensor, side: Tensor | None) -> Tensor:
    """[..., width] to [..., P] by a matrix [P, width], to [..., width] by a scale [width], or as it is."""
    if side is None:
        return value
    return value @ side.T if side.dim() == 2 else value * side
